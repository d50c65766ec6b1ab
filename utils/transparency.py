"""Colours under transparent pixels, which files leave black or arbitrary.

Axes: H W image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_transparent(rgb_3HW: Tensor, alpha_HW: Tensor) -> Tensor:
    """Give fully transparent pixels the colours of what is visible around them.

    What enlarges a picture mixes neighbours. With black under the transparent pixels the visible
    edge would get a dark fringe; with its own colours continued it gets none, and colour and alpha
    can be enlarged apart. (Push-pull: ever coarser averages of the visible colours, weighted by
    alpha, fill the gaps of the finer ones.)

    Args:
        rgb_3HW: float, not premultiplied.
        alpha_HW: float in [0, 1].

    Returns:
        (3, H, W); pixels with alpha above 0 are unchanged. Where nothing is visible, all black.
    """
    visible = alpha_HW > 0
    if bool(visible.all()):
        return rgb_3HW
    return torch.where(visible, rgb_3HW, _filled(rgb_3HW[None], alpha_HW[None, None])[0])


def _filled(rgb: Tensor, weight: Tensor) -> Tensor:
    """(1, 3, H, W) with the pixels of weight 0 filled from the next coarser level."""
    height, width = weight.shape[-2:]
    known = weight > 0
    rgb = torch.where(known, rgb, 0.0)
    if height == width == 1 or bool(known.all()):
        return rgb
    # Sides are padded to even by weight 0, which the averages leave out.
    padding = (0, width % 2, 0, height % 2)
    weighted, weight = F.pad(rgb * weight, padding), F.pad(weight, padding)
    coarse_weight = F.avg_pool2d(weight, 2)
    tiny = torch.finfo(weight.dtype).tiny
    coarse = F.avg_pool2d(weighted, 2) / coarse_weight.clamp_min(tiny)
    coarse = _filled(coarse, coarse_weight)
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return torch.where(known, rgb, fine[..., :height, :width])
