"""Pixels sorted by class, without waiting for the device.

A counting sort in two passes over the class map: every block of pixels counts its classes, a
cumulative sum turns the counts into places, and every block writes its pixels there. No atomics,
so the order is that of the pixels, in every run.

Axes: B batch, H W output, M classes, N blocks, Q = B H W pixels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2048


@dataclass(frozen=True)
class Partition:
    """The pixels of each class.

    Attributes:
        pixels_Q: int32, indices into the flattened class map, sorted by class, then by index.
        bounds: (M + 1,) int32: class j is ``pixels_Q[bounds[j] : bounds[j + 1]]``.
    """

    pixels_Q: Tensor
    bounds: Tensor
    _bounds_on_host: Tensor
    _arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, classes_BHW: Tensor, count: int) -> "Partition":
        """Sort the pixels of a class map.

        Args:
            classes_BHW: uint8 in 0..count-1.
            count: M.
        """
        flat_Q = classes_BHW.contiguous().view(-1)
        total = flat_Q.numel()
        blocks = triton.cdiv(total, _BLOCK)
        counts_MN = flat_Q.new_empty(count, blocks, dtype=torch.int32)
        pixels_Q = flat_Q.new_empty(total, dtype=torch.int32)
        with torch.cuda.device_of(flat_Q):
            if total:
                _count[(blocks,)](flat_Q, counts_MN, total, blocks, CLASSES=count, BLOCK=_BLOCK)
            ends_MN = counts_MN.view(-1).cumsum(0, dtype=torch.int32).view(count, blocks)
            if total:
                _place[(blocks,)](
                    flat_Q, ends_MN, pixels_Q, total, blocks, CLASSES=count, BLOCK=_BLOCK
                )
            bounds = F.pad(ends_MN[:, -1], (1, 0)) if total else ends_MN.new_zeros(count + 1)
            on_host = bounds.to("cpu", non_blocking=True)
            arrived = None
            if bounds.is_cuda:
                arrived = torch.cuda.Event()
                arrived.record()
        return cls(pixels_Q, bounds, on_host, arrived)

    def counts(self) -> list[int]:
        """Pixels of each class. Waits for the partition, not for what was started after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._bounds_on_host.diff().tolist()


@triton.jit(do_not_specialize=["total", "blocks"])
def _count(classes_ptr, counts_ptr, total, blocks, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    of_pixel = tl.load(classes_ptr + pixel, mask=pixel < total, other=CLASSES)
    for j in tl.static_range(CLASSES):
        tl.store(counts_ptr + j * blocks + block, tl.sum((of_pixel == j).to(tl.int32)))


@triton.jit(do_not_specialize=["total", "blocks"])
def _place(
    classes_ptr, ends_ptr, pixels_ptr, total, blocks, CLASSES: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    of_pixel = tl.load(classes_ptr + pixel, mask=pixel < total, other=CLASSES)
    for j in tl.static_range(CLASSES):
        is_in = of_pixel == j
        one = is_in.to(tl.int32)
        before = tl.cumsum(one, 0) - one
        start = tl.load(ends_ptr + j * blocks + block) - tl.sum(one)
        tl.store(pixels_ptr + start + before, pixel, mask=is_in)
