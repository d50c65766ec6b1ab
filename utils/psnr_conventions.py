"""One prediction's PSNR as papers and tools compute it: to find the convention behind a figure.

Axes: H W image, r rows of it; 3 RGB; C compared channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from utils.metrics import LUMA, LUMA_OFFSET, luma, quantise

# PSNR in dB per channels' name, and of that per border.
Psnrs = Mapping[str, Mapping[int, float]]

# A border that tables of DIV2K leave out beside the scale (EDSR, Lim et al. 2017).
WIDER_PX = 6
_STRIP_ROWS = 512


def _limited_y(rgb_rW3: NDArray) -> NDArray:
    return rgb_rW3 @ LUMA + LUMA_OFFSET


def _full_y(rgb_rW3: NDArray) -> NDArray:
    return rgb_rW3 @ np.array([0.299, 0.587, 0.114])


def _rounded_y(rgb_rW3: NDArray) -> NDArray:
    return luma(rgb_rW3.astype(np.uint8)).astype(np.float64)


def _same(rgb_rW3: NDArray) -> NDArray:
    return rgb_rW3


# What is compared of an 8-bit image.
_CHANNELS: dict[str, Callable[[NDArray], NDArray]] = {
    "rgb": _same,
    "y": _rounded_y,
    "y not rounded": _limited_y,
    "y full range": _full_y,
}
_NOT_ROUNDED = "rgb not rounded"
_BY_CHANNEL = "mean of r, g, b"
NAMES = ("rgb", _NOT_ROUNDED, _BY_CHANNEL, "y", "y not rounded", "y full range")
LEGEND = (
    "8 bit but for `rgb not rounded`; mean of r, g, b: of their PSNRs; y: BT.601 luma in 16..235,",
    "rounded as by MATLAB, or not; y full range: in 0..255, not rounded",
)


def borders(border_px: int) -> tuple[int, ...]:
    """Borders that are left out: none, the scale's, and a wider one."""
    return tuple(dict.fromkeys((0, border_px, border_px + WIDER_PX)))


def psnrs(sr: Tensor, hr: NDArray[np.uint8], border_px: int) -> Psnrs:
    """PSNR of one image by each of :data:`NAMES`, for each of :func:`borders`.

    ``rgb`` and ``y`` at `border_px` are the figures of `utils.metrics.psnr`.

    Args:
        sr: (3, H, W) float, nominally in [0, 1], on any device.
        hr: (H, W, 3).
        border_px: pixels that the table's own figure leaves out on each side.

    Returns:
        dB: inf for equal images, nan where no pixel lies inside the border.
    """
    means = {border: _mean_squares(sr, hr, border) for border in borders(border_px)}
    return {
        name: {border: _decibels(squares[name]) for border, squares in means.items()}
        for name in NAMES
    }


def mean_psnrs(images: Sequence[Psnrs]) -> Psnrs:
    """The mean over images (at least one), of each figure."""
    first = images[0]
    return {
        name: {border: sum(image[name][border] for image in images) / len(images) for border in row}
        for name, row in first.items()
    }


def _mean_squares(sr: Tensor, hr: NDArray[np.uint8], border: int) -> dict[str, NDArray]:
    """Mean squared difference per channel (C,), by each name; nan for an empty image."""
    height, width = hr.shape[:2]
    columns = slice(border, width - border)
    pixels = max(0, height - 2 * border) * max(0, width - 2 * border)
    sums: dict[str, NDArray] = {}
    for top in range(border, height - border, _STRIP_ROWS):
        rows = slice(top, min(top + _STRIP_ROWS, height - border))
        sr_3rW, hr_rW3 = sr[:, rows, columns], hr[rows, columns].astype(np.float64)
        if not hr_rW3.size:
            continue
        for name, squares in _squares(sr_3rW, hr_rW3).items():
            sums[name] = sums.get(name, 0.0) + squares
    if not sums:
        return dict.fromkeys(NAMES, np.array([math.nan]))
    return {name: values / pixels for name, values in sums.items()}


def _squares(sr_3rW: Tensor, hr_rW3: NDArray) -> dict[str, NDArray]:
    """Sums of squared differences over the pixels, per channel."""
    rounded_rW3 = quantise(sr_3rW).astype(np.float64)
    exact_rW3 = sr_3rW.detach().cpu().double().clamp(0, 1).mul(255).permute(1, 2, 0).numpy()
    sums = {
        name: _sum_of_squares(channels(rounded_rW3) - channels(hr_rW3))
        for name, channels in _CHANNELS.items()
    }
    sums[_BY_CHANNEL] = sums["rgb"]
    # As one channel, whose PSNR is that of all three together.
    sums["rgb"] = sums["rgb"].mean(keepdims=True)
    sums[_NOT_ROUNDED] = _sum_of_squares(exact_rW3 - hr_rW3).mean(keepdims=True)
    return sums


def _sum_of_squares(difference: NDArray) -> NDArray:
    """Per channel (C,), of (r, W, C) or of the one channel (r, W)."""
    return np.square(np.atleast_3d(difference)).sum((0, 1))


def _decibels(squares_C: NDArray) -> float:
    """PSNR at peak 255; of several channels the mean of theirs."""
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(255**2 / squares_C)))
