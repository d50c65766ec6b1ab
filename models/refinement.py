"""Pixel-wise refinement: smooths the border between regions of different upsamplers.

Axes: B batch, H W output.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from models import kernels
from models.native import library
from models.native.bindings import Library
from models.native.passes import refine_rows

_log = logging.getLogger(__name__)
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
    refined = torch.empty_like(prediction_B3HW, memory_format=torch.contiguous_format)
    _refine_into(refined, [(prediction_B3HW, classes_BHW)], 0)
    return refined


def _refine_into(out_B3rW: Tensor, pieces: Sequence[tuple[Tensor, Tensor]], first: int) -> None:
    """Rows `first` to first + r of what :func:`refine` gives for pieces one under the other."""
    predictions, classes = zip(*pieces, strict=True)
    tensors = [out_B3rW, *predictions]
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        kernels = library()
        in_order = all(tensor.stride(-1) == 1 for tensor in (*tensors, *classes))
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if kernels is not None and in_order and not needs_grad and _are_right(kernels):
            refine_rows(kernels, pieces, first, out_B3rW)
            return
    prediction, of_pixels = predictions[0], classes[0]
    if len(pieces) > 1:
        prediction, of_pixels = torch.cat(predictions, dim=2), torch.cat(classes, dim=1)
    if out_B3rW.dtype == torch.float32 and not torch.is_grad_enabled() and _by_kernel(out_B3rW):
        from models.kernels.refine import refine_rows as refine_on_gpu  # needs Triton

        refine_on_gpu(prediction.contiguous(), of_pixels.contiguous(), first, out_B3rW)
        return
    refined = _plainly_refined(prediction, of_pixels)
    out_B3rW.copy_(refined[:, :, first : first + out_B3rW.shape[2]])


def _by_kernel(out_B3rW: Tensor) -> bool:
    """Whether the GPU kernel can write this."""
    device = out_B3rW.device
    return device.type != "cpu" and out_B3rW.stride(-1) == 1 and _is_right_on(device)


@functools.cache
def _is_right_on(device: torch.device) -> bool:
    """Whether the GPU kernel gives what plain torch does, on a small image."""

    def is_right() -> bool:
        from models.kernels.refine import refine_rows as refine_on_gpu  # needs Triton

        prediction, classes = (each.to(device) for each in _example())
        ours = torch.empty_like(prediction)
        refine_on_gpu(prediction, classes, 0, ours)
        return bool((ours - _plainly_refined(prediction, classes)).abs().max() <= 1e-6)

    return kernels.agrees("refinement", device, is_right)


@functools.cache
def _are_right(kernels: Library) -> bool:
    """Whether the compiled pass gives what plain torch does, on a small image."""
    prediction, classes = _example()
    ours = torch.empty_like(prediction)
    refine_rows(kernels, [(prediction, classes)], 0, ours)
    right = bool((ours - _plainly_refined(prediction, classes)).abs().max() <= 1e-6)
    if not right:
        _log.warning("CPU kernels: their refinement is wrong; plain torch is used instead")
    return right


def _example() -> tuple[Tensor, Tensor]:
    """A small image and its classes, a part of which has no border."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(1, 3, 5, 300, generator=generator)
    classes = torch.randint(3, (1, 5, 300), generator=generator).to(torch.uint8)
    classes[..., 70:] = 0
    return prediction, classes


def _plainly_refined(prediction_B3HW: Tensor, classes_BHW: Tensor) -> Tensor:
    """:func:`refine` by torch, on any device."""
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
    """:func:`refine` on an image that comes in runs of rows, from top to bottom.

    Args:
        out_B3HW: takes the refined image, row by row as soon as they are determined.
    """

    def __init__(self, out_B3HW: Tensor) -> None:
        self._out = out_B3HW
        self._done = 0
        # The last row that was given and the one that waits for the row below it.
        self._kept: list[tuple[Tensor, Tensor]] = []

    def push(self, prediction_B3rW: Tensor, classes_BrW: Tensor, last: bool) -> None:
        """Take the next rows; `last` says that no more follow."""
        pieces = [*self._kept, (prediction_B3rW, classes_BrW)]
        height = sum(prediction.shape[2] for prediction, _ in pieces)
        start = min(1, self._done)
        count = height - start - (0 if last else 1)
        if count > 0:
            _refine_into(self._out[:, :, self._done : self._done + count], pieces, start)
            self._done += count
        # Copies: a view would keep the memory of all rows.
        below = [(prediction[:, :, -2:], classes[:, -2:]) for prediction, classes in pieces]
        predictions, classes = zip(*below, strict=True)
        self._kept = [(torch.cat(predictions, dim=2)[:, :, -2:], torch.cat(classes, dim=1)[:, -2:])]
