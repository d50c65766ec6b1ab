"""From images to ``{"lr", "hr"}`` samples: crops, augmentation, LR images.

A sample is asked for by a plain index, which gives a central crop (or the whole image) without
anything random, for validation and tests; or by a `SampleKey`, for training.

Axes: H W of HR, h w of LR; tensors are (3, H, W) float32 RGB in [0, 1] (a bicubic LR image leaves
the range a little).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
import torch

from datasets.folders import ImageFolder, PairedImageFolders
from datasets.registry import WRAPPERS
from datasets.resize import imresize, imresize_crops, imresize_uint8
from datasets.sampling import SampleKey
from utils.errors import UserError
from utils.images import to_tensor
from utils.registry import nearest

LrMode = Literal["float", "uint8"]
Sample = dict[str, torch.Tensor]
Source = TypeVar("Source", bound=ImageFolder | PairedImageFolders)

LR_MODES = ("float", "uint8")
FLIPS = ("hflip", "vflip", "dflip")


def downsample(hr: np.ndarray, size: tuple[int, int], lr_mode: LrMode = "float") -> torch.Tensor:
    """LR image of `hr` by MATLAB's bicubic.

    Args:
        hr: (H, W, 3) uint8.
        size: (h, w) of the result.
        lr_mode: ``float`` (not rounded, not clamped) or ``uint8``.

    Returns:
        (3, h, w) float32.
    """
    if lr_mode == "uint8":
        return to_tensor(imresize_uint8(hr, size=size))
    return imresize(to_tensor(hr), size=size)


def crop_to_scale(
    hr: np.ndarray, scale: float, name: str | Path
) -> tuple[np.ndarray, tuple[int, int]]:
    """Crop from the top left to what `scale` divides.

    Returns:
        the cropped (H, W, 3) image and (h, w): h = floor(H / scale), and H becomes
        round(h * scale), the multiple of the scale where that is a whole number.

    Raises:
        UserError: no LR pixel would be left; `name` is in the message.
    """
    (height, width), lr_size = sizes_at_scale((hr.shape[0], hr.shape[1]), scale, name)
    return hr[:height, :width], lr_size


def sizes_at_scale(
    hr_size: tuple[int, int], scale: float, name: str | Path
) -> tuple[tuple[int, int], tuple[int, int]]:
    """What :func:`crop_to_scale` leaves of an image of (H, W), and its LR: (H, W) and (h, w).

    Raises:
        UserError: no LR pixel would be left; `name` is in the message.
    """
    height, width = hr_size
    # The small term keeps the noise of 8.1 / 2.7 = 2.9999999999999996 from costing a pixel.
    lr_height, lr_width = (math.floor(length / scale + 1e-6) for length in hr_size)
    if min(lr_height, lr_width) < 1:
        raise UserError(f"image {name} is {width}x{height}, too small for scale {scale:g}")
    height = min(height, round(lr_height * scale))
    width = min(width, round(lr_width * scale))
    return (height, width), (lr_height, lr_width)


class _Samples(Generic[Source]):
    """What the wrappers share: a data set, crops of one size, flips.

    Args:
        dataset: where images come from.
        inp_size, augment: see `SRImplicitDownsampled`.
    """

    def __init__(
        self,
        dataset: Source,
        inp_size: int | None,
        augment: bool | Sequence[str],
    ) -> None:
        self.dataset = dataset
        self.inp_size = _checked_size(inp_size)
        self.flips = _checked_flips(augment)

    @property
    def names(self) -> list[str]:
        """The file name of each sample (of a pair, the HR image's)."""
        return self.dataset.names

    def __len__(self) -> int:
        return len(self.dataset)


@WRAPPERS.register("sr-implicit-downsampled")
class SRImplicitDownsampled(_Samples[ImageFolder]):
    """HR crops and their bicubic LR images.

    Args:
        dataset: HR images, an `ImageFolder`.
        scale: a number, or [min, max]: an iteration draws one real scale from that range, the
            same for its whole batch; a plain index gets the largest.
        inp_size: side of the square LR crop in pixels; the HR crop has round(inp_size * scale).
            Without it, samples are whole images, cropped from the top left to a multiple of
            the scale.
        augment: which of ``hflip``, ``vflip``, ``dflip`` (transposition) to apply, each with
            probability 1/2 and only to keyed samples; true means all.
        lr_mode: ``float`` or ``uint8``, see `datasets.resize`.

    Raises:
        UserError: arguments out of range; on access, an image that is too small (it is named).
    """

    def __init__(
        self,
        *,
        dataset: ImageFolder,
        scale: float | Sequence[float],
        inp_size: int | None = None,
        augment: bool | Sequence[str] = (),
        lr_mode: LrMode = "float",
    ) -> None:
        if not isinstance(dataset, ImageFolder):
            raise UserError("wrapper `sr-implicit-downsampled` needs dataset `image-folder`")
        if lr_mode not in LR_MODES:
            raise UserError(f"lr_mode must be one of {', '.join(LR_MODES)}, not {lr_mode!r}")
        super().__init__(dataset, inp_size, augment)
        self.lowest_scale, self.highest_scale = _scale_range(scale)
        self.lr_mode: LrMode = lr_mode

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """``{"lr": (3, h, w), "hr": (3, H, W)}`` float32."""
        index, generator = _opened(key)
        scale = self.highest_scale
        if isinstance(key, SampleKey):
            scale = key.scale(self.lowest_scale, self.highest_scale)
        hr, name = self.dataset[index], self.dataset.name(index)
        if self.inp_size is None:
            (hr,) = _flipped([hr], self.flips, generator)
            hr, size = crop_to_scale(hr, scale, name)
            return {"lr": downsample(hr, size, self.lr_mode), "hr": to_tensor(hr)}
        side = round(self.inp_size * scale)
        top, left = _corner(hr, side, generator, name)
        (hr,) = _flipped([_square(hr, top, left, side)], self.flips, generator)
        return self._reduced(hr, (self.inp_size, self.inp_size))

    def _reduced(self, hr: np.ndarray, size: tuple[int, int]) -> Sample:
        if self.lr_mode == "uint8":
            return {"lr": downsample(hr, size, self.lr_mode), "hr": to_tensor(hr)}
        tensor = to_tensor(hr)
        return {"lr": imresize_crops(tensor[None], size)[0], "hr": tensor}


@WRAPPERS.register("sr-implicit-paired")
class SRImplicitPaired(_Samples[PairedImageFolders]):
    """HR images and the LR images on disk, or the same crop of both.

    Args:
        dataset: a `PairedImageFolders`.
        inp_size: side of the square LR crop in pixels; without it, samples are whole images.
        augment: as for `SRImplicitDownsampled`.

    Raises:
        UserError: arguments out of range; on access, an image that is too small or a pair without
            a common scale (it is named).
    """

    def __init__(
        self,
        *,
        dataset: PairedImageFolders,
        inp_size: int | None = None,
        augment: bool | Sequence[str] = (),
    ) -> None:
        if not isinstance(dataset, PairedImageFolders):
            raise UserError("wrapper `sr-implicit-paired` needs dataset `paired-image-folders`")
        super().__init__(dataset, inp_size, augment)

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """``{"lr": (3, h, w), "hr": (3, H, W)}`` float32, H = scale * h."""
        index, generator = _opened(key)
        hr, lr, scale = self.dataset[index]
        if self.inp_size is not None:
            side = self.inp_size
            top, left = _corner(lr, side, generator, f"LR of {self.dataset.name(index)}")
            lr = _square(lr, top, left, side)
            hr = _square(hr, top * scale, left * scale, side * scale)
        hr, lr = _flipped([hr, lr], self.flips, generator)
        return {"lr": to_tensor(lr), "hr": to_tensor(hr)}


def _opened(key: int | SampleKey) -> tuple[int, np.random.Generator | None]:
    """The index, and the random numbers unless the key is a plain index."""
    if isinstance(key, SampleKey):
        return key.index, key.generator()
    return int(key), None


def _corner(
    image: np.ndarray,
    side: int,
    generator: np.random.Generator | None,
    name: str,
) -> tuple[int, int]:
    """Top and left of a square crop: random, or central without a generator."""
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise UserError(
            f"image {name} is {width}x{height}, too small for a crop of {side}x{side}; remove it "
            "or reduce inp_size"
        )
    if generator is None:
        return (height - side) // 2, (width - side) // 2
    return int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))


def _square(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    return image[top : top + side, left : left + side]


def _flipped(
    images: Sequence[np.ndarray], flips: Sequence[str], generator: np.random.Generator | None
) -> list[np.ndarray]:
    """Each of `flips` with probability 1/2, the same for all images; none without a generator."""
    if generator is None:
        return list(images)
    # All three are drawn whichever are asked for: crops then do not depend on `augment`.
    chosen = dict(zip(FLIPS, generator.random(len(FLIPS)) < 0.5, strict=True))
    if chosen["hflip"] and "hflip" in flips:
        images = [image[:, ::-1] for image in images]
    if chosen["vflip"] and "vflip" in flips:
        images = [image[::-1] for image in images]
    if chosen["dflip"] and "dflip" in flips:
        images = [image.transpose(1, 0, 2) for image in images]
    return list(images)


def _scale_range(scale: float | Sequence[float]) -> tuple[float, float]:
    bounds = [scale, scale] if isinstance(scale, int | float) else list(scale)
    if len(bounds) != 2 or not all(isinstance(bound, int | float) for bound in bounds):
        raise UserError(f"scale must be a number or [min, max], not {scale}")
    if not 1 <= bounds[0] <= bounds[1] < math.inf:
        raise UserError(f"scale must be at least 1, and min at most max, not {scale}")
    return float(bounds[0]), float(bounds[1])


def _checked_size(inp_size: int | None) -> int | None:
    if inp_size is not None and inp_size < 1:
        raise UserError(f"inp_size must be 1 or more, not {inp_size}")
    return inp_size


def _checked_flips(augment: bool | Sequence[str]) -> tuple[str, ...]:
    if isinstance(augment, bool):
        return FLIPS if augment else ()
    names = [augment] if isinstance(augment, str) else list(augment)
    for name in names:
        if name not in FLIPS:
            raise UserError(
                f"augment: unknown `{name}`{nearest(name, FLIPS)}; known: {', '.join(FLIPS)}"
            )
    return tuple(names)
