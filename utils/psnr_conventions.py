"""One prediction's PSNR as papers and tools compute it: to find the convention behind a figure.

Axes: H W image, r rows of it; 3 RGB; C compared channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from utils.metrics import LUMA, luma, quantise

# PSNR in dB per channels' name, and of that per border.
Psnrs = Mapping[str, Mapping[int, float]]

# A border that tables of DIV2K leave out beside the scale (EDSR, Lim et al. 2017).
WIDER_PX = 6
_STRIP_ROWS = 512


# What is compared of an 8-bit image, up to what is added to all of it.
_CHANNELS: dict[str, Callable[[NDArray], NDArray]] = {
    "rgb": lambda rgb_rW3: rgb_rW3,
    "y": lambda rgb_rW3: luma(rgb_rW3.astype(np.uint8)).astype(np.float64),
    "y not rounded": lambda rgb_rW3: rgb_rW3 @ LUMA,
    "y full range": lambda rgb_rW3: rgb_rW3 @ np.array([0.299, 0.587, 0.114]),
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
    height, width = hr.shape[:2]
    sums: dict[tuple[str, int], NDArray | float] = {}
    for top in range(0, height, _STRIP_ROWS):
        rows = slice(top, min(top + _STRIP_ROWS, height))
        for name, squares_rWC in _squares(sr[:, rows], hr[rows].astype(np.float64)).items():
            for border in borders(border_px):
                first = max(border - top, 0)
                last = min(height - border, rows.stop) - top
                inner = squares_rWC[first : max(first, last), border : max(border, width - border)]
                sums[name, border] = sums.get((name, border), 0.0) + inner.sum((0, 1))
    pixels = {
        border: max(0, height - 2 * border) * max(0, width - 2 * border)
        for border in borders(border_px)
    }
    return {
        name: {
            border: _decibels(sums[name, border], name, count) for border, count in pixels.items()
        }
        for name in NAMES
    }


def mean_psnrs(images: Sequence[Psnrs]) -> Psnrs:
    """The mean over images (at least one), of each figure."""
    first = images[0]
    return {
        name: {border: sum(image[name][border] for image in images) / len(images) for border in row}
        for name, row in first.items()
    }


def _squares(sr_3rW: Tensor, hr_rW3: NDArray) -> dict[str, NDArray]:
    """Squared differences (r, W, C) of what each name compares."""
    rounded_rW3 = quantise(sr_3rW).astype(np.float64)
    exact_rW3 = sr_3rW.detach().cpu().double().clamp(0, 1).mul(255).permute(1, 2, 0).numpy()
    squares = {
        name: np.square(np.atleast_3d(channels(rounded_rW3) - channels(hr_rW3)))
        for name, channels in _CHANNELS.items()
    }
    return {
        **squares,
        _BY_CHANNEL: squares["rgb"],
        _NOT_ROUNDED: np.square(exact_rW3 - hr_rW3),
    }


def _decibels(sums_C: NDArray | float, name: str, pixels: int) -> float:
    """PSNR at peak 255: of all channels together, or the mean of theirs."""
    if not pixels:
        return math.nan
    means_C = np.atleast_1d(sums_C) / pixels
    if name != _BY_CHANNEL:
        means_C = means_C.mean(keepdims=True)
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(255**2 / means_C)))
