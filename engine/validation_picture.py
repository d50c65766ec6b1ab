"""A small picture of what validation made of an image.

Axes: h w LR, H W output.
"""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.restore import Restored
from utils.colour import blend_classes
from utils.metrics import quantise

# Of each panel, in output pixels: a picture is written at every validation.
SIDE_PX = 192
_GAP_PX = 4
_OPACITY = 0.5


def panels(lr: Tensor, restored: Restored, *, with_classes: bool) -> NDArray[np.uint8]:
    """The centre of an image: LR enlarged, SR, and where wanted the class map, side by side.

    Args:
        lr: (3, h, w) float RGB, nominally in [0, 1].
        restored: what the network made of it.
        with_classes: show the class colours over SR, too; `restored` must have classes.

    Returns:
        (at most SIDE_PX, .., 3) uint8.
    """
    centre = [_centre(*sizes) for sizes in zip(lr.shape[-2:], restored.sr.shape[-2:], strict=True)]
    (rows_lr, rows), (columns_lr, columns) = centre
    sr = quantise(restored.sr[:, rows, columns])
    small = lr[None, :, rows_lr, columns_lr]
    enlarged = quantise(F.interpolate(small, size=sr.shape[:2], mode="nearest-exact")[0])
    parts = [enlarged, sr]
    if with_classes:
        assert restored.classes is not None
        classes = restored.classes[rows, columns].cpu().numpy()
        parts.append(blend_classes(sr, classes, len(restored.shares), _OPACITY))
    gap = np.full((len(sr), _GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for panel in parts for part in (panel, gap)][:-1], axis=1)


def _centre(lr_length: int, length: int) -> tuple[slice, slice]:
    """The middle of an axis: of LR, and of an output that shows the same."""
    scale = length / lr_length
    shown = min(lr_length, max(1, int(SIDE_PX / scale)))
    first = (lr_length - shown) // 2
    return slice(first, first + shown), slice(round(first * scale), round((first + shown) * scale))
