"""Validation images that cannot be used are found before training, not hours into it.

Sizes are (H, W) and (h, w) in pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import nn
from torch.utils.data import Dataset

from datasets.pairing import common_size
from datasets.wrappers import SRImplicitDownsampled, SRImplicitPaired, sizes_at_scale
from models.backbones.base import SRNetwork
from utils.errors import UserError
from utils.images import read_size

_SizeOf = Callable[[Path], tuple[int, int]]


class _Image(NamedTuple):
    """A validation image, and the sizes of its sample."""

    path: Path
    scale: float
    hr: tuple[int, int]
    lr: tuple[int, int]


def border_of(hr_size: tuple[int, int], lr_size: tuple[int, int]) -> int:
    """HR pixels that the metrics leave out on each side: as many as the scale, rounded."""
    return round(sum(hr / lr for hr, lr in zip(hr_size, lr_size, strict=True)) / 2)


def check_validation_images(sets: Iterable[tuple[float, Dataset]], model: nn.Module) -> None:
    """Refuse images too small for the metrics, and pairs of a scale that is not the model's.

    Only headers are read. Samples of other kinds than the two wrappers here are not looked at.

    Args:
        sets: see `engine.data.validation_sets`.
        model: what is to be validated.

    Raises:
        UserError: naming the image.
    """
    size_of = cache(read_size)
    own_scale = model.scale if isinstance(model, SRNetwork) else 0
    for set_scale, samples in sets:
        if isinstance(samples, SRImplicitDownsampled):
            images = _downsampled(samples, size_of)
        elif isinstance(samples, SRImplicitPaired):
            images = _paired(samples, size_of, (set_scale, own_scale))
        else:
            continue
        for image in images:
            border = border_of(image.hr, image.lr)
            if min(image.hr) <= 2 * border:
                height, width = size_of(image.path)
                raise UserError(
                    f"validation image {image.path} is {width}x{height}, too small for scale "
                    f"{image.scale:g}: nothing is left inside a border of {border} px; remove it"
                )


def _downsampled(samples: SRImplicitDownsampled, size_of: _SizeOf) -> Iterator[_Image]:
    scale, side = samples.highest_scale, samples.inp_size
    for path in samples.dataset.paths:
        hr_size = size_of(path)
        if side is None:
            yield _Image(path, scale, *sizes_at_scale(hr_size, scale, path))
        else:
            hr_side = round(side * scale)
            _check_crop(path, hr_size, hr_side)
            yield _Image(path, scale, (hr_side, hr_side), (side, side))


def _paired(
    samples: SRImplicitPaired, size_of: _SizeOf, wanted: Sequence[float]
) -> Iterator[_Image]:
    side = samples.inp_size
    for path, lr_path in zip(samples.dataset.hr_paths, samples.dataset.lr_paths, strict=True):
        scale, lr_size = common_size(size_of(path), size_of(lr_path), path.name)
        for other in wanted:
            if other not in (0, scale):
                raise UserError(
                    f"validation image {path} is {scale} times its LR {lr_path.name}, not {other:g}"
                )
        if side is not None:
            _check_crop(lr_path, size_of(lr_path), side)
            lr_size = (side, side)
        yield _Image(path, scale, (lr_size[0] * scale, lr_size[1] * scale), lr_size)


def _check_crop(path: Path, size: tuple[int, int], side: int) -> None:
    if min(size) < side:
        raise UserError(
            f"validation image {path} is {size[1]}x{size[0]}, too small for a crop of "
            f"{side}x{side}: remove it or reduce inp_size"
        )
