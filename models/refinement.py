"""Pixel-wise refinement: smooths the border between regions of different upsamplers.

Axes: B batch, H W output.
"""

import torch
from torch import Tensor

# Rows that are averaged at once: their temporaries stay in cache.
_STRIP_ROWS = 64


def refine(prediction_B3HW: Tensor, classes_BHW: Tensor) -> Tensor:
    """Average pixels that touch a heavier region.

    A pixel with at least one pixel of a heavier class among its 3x3 neighbours becomes the 3x3
    mean of `prediction_B3HW`. The outermost rows and columns stay as they are, so no padding is
    needed and an image under 3 pixels high or wide comes back unchanged.

    Args:
        prediction_B3HW: (B, 3, H, W) float, any range.
        classes_BHW: (B, H, W) uint8, 0 the lightest upsampler.

    Returns:
        (B, 3, H, W), same dtype; `prediction_B3HW` is left unchanged.
    """
    refined = prediction_B3HW.clone()
    height, width = prediction_B3HW.shape[-2:]
    if min(height, width) < 3:
        return refined
    below_heavier = _heaviest_of_3x3(classes_BHW)[:, 1:-1, 1:-1] > classes_BHW[:, 1:-1, 1:-1]
    for first in range(1, height - 1, _STRIP_ROWS):
        last = min(height - 1, first + _STRIP_ROWS)
        above, here, under = (prediction_B3HW[:, :, first + d : last + d] for d in (-1, 0, 1))
        columns = (above + here).add_(under)
        mean = (columns[..., :-2] + columns[..., 1:-1]).add_(columns[..., 2:]).mul_(1 / 9)
        inner = refined[:, :, first:last, 1:-1]
        inner.copy_(mean.where(below_heavier[:, None, first - 1 : last - 1], inner))
    return refined


def _heaviest_of_3x3(classes_BHW: Tensor) -> Tensor:
    """Largest class among the 3x3 neighbours that lie inside the image."""
    rows = classes_BHW.clone()
    rows[:, :, 1:] = torch.maximum(rows[:, :, 1:], classes_BHW[:, :, :-1])
    rows[:, :, :-1] = torch.maximum(rows[:, :, :-1], classes_BHW[:, :, 1:])
    both = rows.clone()
    both[:, 1:] = torch.maximum(both[:, 1:], rows[:, :-1])
    both[:, :-1] = torch.maximum(both[:, :-1], rows[:, 1:])
    return both


class RefineRows:
    """:func:`refine` on an image that comes in runs of rows, from top to bottom."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._at_top = True

    def push(self, prediction_B3rW: Tensor, classes_BrW: Tensor, last: bool) -> Tensor:
        """Take the next rows; `last` says that no more follow.

        Returns:
            (B, 3, r', W): the refined rows that are determined now and were not before.
        """
        prediction, classes = prediction_B3rW, classes_BrW
        if self._kept is not None:
            prediction = torch.cat([self._kept[0], prediction], dim=2)
            classes = torch.cat([self._kept[1], classes], dim=1)
        start = 0 if self._at_top else 1
        stop = prediction.shape[2] - (0 if last else 1)
        if stop <= start:
            self._kept = prediction, classes
            return prediction[:, :, :0]
        self._at_top = False
        # The last row that is given now and the one that waits for the row below it.
        self._kept = prediction[:, :, stop - 1 :], classes[:, stop - 1 :]
        return refine(prediction, classes)[:, :, start:stop]
