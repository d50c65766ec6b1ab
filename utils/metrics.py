"""PSNR and SSIM under the field's named conventions. Nothing here changes a caller's array.

Both metrics compare 8-bit images: predictions are clamped and rounded first (:func:`quantise`).
`rgb` takes all channels together; `y` takes the BT.601 limited-range luma (16..235), rounded to
8 bits as MATLAB's ``rgb2ycbcr`` does. `border_px` pixels are shaved off each side, by custom as
many as the scale.

A PSNR of identical images is infinite and an SSIM of an image smaller than its window undefined
(nan); JSON has neither, so :func:`json_number` writes both as null.

Axes: H W image; 3 RGB.
"""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from utils.errors import UserError

PsnrType = Literal["rgb", "y"]

SSIM_WINDOW_PX = 11
SSIM_CONVENTION = (
    "Gaussian 11x11 window, sigma 1.5, population covariance, data range 255, "
    "valid positions only, mean over channels"
)
# BT.601 limited-range Y of 8-bit RGB, but for the 16 that is added.
LUMA = np.array([65.481, 128.553, 24.966]) / 255
_STRIP_ROWS = 512


def quantise(image: Tensor | NDArray) -> NDArray[np.uint8]:
    """The 8-bit image that a file would hold.

    Args:
        image: (3, H, W) float tensor, nominally in [0, 1], on any device; or an (H, W, 3) uint8
            array, which is returned as it is.

    Returns:
        (H, W, 3) uint8: clamped to [0, 1], times 255, rounded (half to even).
    """
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise UserError(
                f"metrics: expected a float image (3, H, W), got {image.dtype} {image.shape}"
            )
        scaled = image.detach().float().clamp(0, 1).mul(255).round()
        return scaled.byte().permute(1, 2, 0).cpu().numpy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"metrics: expected uint8 (H, W, 3), got {image.dtype} {image.shape}")
    return image


def luma(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """BT.601 limited-range Y, (H, W) uint8 in 16..235, of an (H, W, 3) uint8 image."""
    return np.rint(rgb @ LUMA + 16).astype(np.uint8)


def psnr(
    sr: Tensor | NDArray, hr: Tensor | NDArray, *, psnr_type: PsnrType, border_px: int
) -> float:
    """Peak signal-to-noise ratio in dB, with the mean error over all channels and peak 255.

    Args:
        sr, hr: as :func:`quantise` takes them, of equal size.
        psnr_type: `rgb` or `y`.
        border_px: pixels to leave out on each side.

    Returns:
        dB; ``inf`` for identical images.

    Raises:
        UserError: sizes that differ, an unknown `psnr_type`, or no pixel left inside the border.
    """
    sr_HWC, hr_HWC = _channels(sr, hr, psnr_type, border_px)
    difference = sr_HWC.astype(np.int16)
    difference -= hr_HWC
    mse = float(np.mean(np.square(difference, dtype=np.int32), dtype=np.float64))
    return math.inf if mse == 0 else 10 * math.log10(255**2 / mse)


def ssim(
    sr: Tensor | NDArray, hr: Tensor | NDArray, *, psnr_type: PsnrType, border_px: int
) -> float:
    """Structural similarity (Wang et al. 2004) as in :data:`SSIM_CONVENTION`, by scikit-image.

    It looks at the same channels and the same pixels as :func:`psnr`, and takes the same
    arguments.

    Returns:
        at most 1; nan where a side is shorter than the window once the border is shaved.
    """
    sr_HWC, hr_HWC = _channels(sr, hr, psnr_type, border_px)
    height, width = sr_HWC.shape[:2]
    if min(height, width) < SSIM_WINDOW_PX:
        return math.nan
    # Strip by strip, as scikit-image keeps a dozen float64 maps: 4 GB for one channel in 8K.
    halo = SSIM_WINDOW_PX - 1
    total = 0.0
    for top in range(0, height - halo, _STRIP_ROWS):
        rows = slice(top, min(top + _STRIP_ROWS + halo, height))
        strip_mean = structural_similarity(
            hr_HWC[rows],
            sr_HWC[rows],
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        total += float(strip_mean) * (rows.stop - rows.start - halo)
    return total / (height - halo)


def json_number(value: float) -> float | None:
    """`value` for JSON: null (None) where it is infinite or not a number."""
    return value if math.isfinite(value) else None


def _channels(
    sr: Tensor | NDArray, hr: Tensor | NDArray, psnr_type: PsnrType, border_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Both images as the compared (H, W, 3) or (H, W, 1) uint8, border shaved."""
    if psnr_type not in get_args(PsnrType):
        raise UserError(f"psnr_type `{psnr_type}`: choose one of {', '.join(get_args(PsnrType))}")
    images = [quantise(sr), quantise(hr)]
    height, width = images[1].shape[:2]
    if images[0].shape != images[1].shape:
        raise UserError(
            f"metrics: the prediction has {images[0].shape[1]}x{images[0].shape[0]} pixels, "
            f"the HR image {width}x{height}; both must be equal"
        )
    if min(height, width) <= 2 * border_px:
        raise UserError(
            f"metrics: an image of {width}x{height} has no pixel inside a border of {border_px} px"
        )
    inner = np.s_[border_px : height - border_px, border_px : width - border_px]
    images = [image[inner] for image in images]
    if psnr_type == "y":
        images = [luma(image)[..., None] for image in images]
    return images[0], images[1]
