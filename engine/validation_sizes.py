"""Validation images that are too small are found before training, not hours into it."""

import math
from collections.abc import Iterable
from pathlib import Path

from torch.utils.data import Dataset

from datasets.pairing import common_size
from datasets.wrappers import SRImplicitDownsampled, SRImplicitPaired
from utils.errors import UserError
from utils.images import read_size


def check_validation_images(sets: Iterable[tuple[float, Dataset]]) -> None:
    """Refuse images of which nothing would be left inside the border that the metrics leave out.

    Only headers are read. Samples of other kinds than the two wrappers here are not looked at.

    Args:
        sets: see `engine.data.validation_sets`.

    Raises:
        UserError: naming the image; also a pair without a common scale.
    """
    for _, samples in sets:
        if isinstance(samples, SRImplicitDownsampled):
            scale = samples.highest_scale
            for path in samples.dataset.columns[0]:
                size = read_size(path)
                # The small term as in `crop_to_scale`.
                _check(path, size, math.floor(min(size) / scale + 1e-6), scale, samples.inp_size)
        elif isinstance(samples, SRImplicitPaired):
            for hr_path, lr_path in zip(*samples.dataset.columns, strict=True):
                size = read_size(hr_path)
                pair_scale, lr_size = common_size(size, read_size(lr_path), hr_path.name)
                _check(hr_path, size, min(lr_size), pair_scale, samples.inp_size)


def _check(
    path: Path, size: tuple[int, int], lr_side: int, scale: float, inp_size: int | None
) -> None:
    """Of an image of `size` (H, W), whose LR is `lr_side` on its short side."""
    image = f"validation image {path} is {size[1]}x{size[0]}, too small for"
    if inp_size is not None and lr_side < inp_size:
        raise UserError(f"{image} a crop of {inp_size} LR pixels at scale {scale:g}: remove it")
    border = round(scale)
    if round((inp_size or lr_side) * scale) <= 2 * border:
        raise UserError(
            f"{image} scale {scale:g}: nothing is left inside a border of {border} px; remove it"
        )
