"""Refinement on a GPU in one pass; see `models.refinement`.

Axes: B batch, H W image, r rows of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def refine_rows(prediction_B3HW: Tensor, classes_BHW: Tensor, first: int, out_B3rW: Tensor) -> None:
    """Write rows `first` to first + r of the refined image.

    Args:
        prediction_B3HW: float32, contiguous.
        classes_BHW: uint8, contiguous.
        out_B3rW: float32, its columns next to each other.
    """
    batch, _, rows, width = out_B3rW.shape
    pixels = rows * width
    if not batch * pixels:
        return
    with torch.cuda.device_of(out_B3rW):
        _refine[(triton.cdiv(pixels, _BLOCK), batch)](
            out_B3rW,
            prediction_B3HW,
            classes_BHW,
            *out_B3rW.stride()[:3],
            first,
            prediction_B3HW.shape[2],
            width,
            pixels,
            BLOCK=_BLOCK,
        )


@triton.jit(
    do_not_specialize=[
        *("out_image", "out_plane", "out_row", "first", "height", "width", "pixels"),
    ]
)
def _refine(
    out_ptr,
    prediction_ptr,
    classes_ptr,
    out_image,
    out_plane,
    out_row,
    first,
    height,
    width,
    pixels,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    is_inside = index < pixels
    row = index // width
    col = index % width
    y = row + first
    place = y.to(tl.int64) * width + col
    area = tl.cast(height, tl.int64) * width
    classes_ptr += image * area
    here = tl.load(classes_ptr + place, mask=is_inside, other=0)
    is_inner = is_inside & (y > 0) & (y < height - 1) & (col > 0) & (col < width - 1)
    heaviest = here
    for tap in tl.static_range(9):
        near = (tap // 3 - 1) * width + (tap % 3 - 1)
        heaviest = tl.maximum(heaviest, tl.load(classes_ptr + place + near, mask=is_inner, other=0))
    is_smoothed = is_inner & (heaviest > here)
    for channel in tl.static_range(3):
        plane_ptr = prediction_ptr + (image * 3 + channel) * area
        value = tl.load(plane_ptr + place, mask=is_inside, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(9):
            near = (tap // 3 - 1) * width + (tap % 3 - 1)
            total += tl.load(plane_ptr + place + near, mask=is_smoothed, other=0.0)
        value = tl.where(is_smoothed, total * (1.0 / 9.0), value)
        at = image * out_image + channel * tl.cast(out_plane, tl.int64)
        at += row.to(tl.int64) * out_row + col
        tl.store(out_ptr + at, value, mask=is_inside)
