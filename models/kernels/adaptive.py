"""ADM on a GPU, without waiting for it; see `models.routing.AdaptiveRouting`.

One pass over the pixels for each of Lloyd's iterations. It adds up the scores on either side of a
threshold, which every program finds anew in what the pass before left. No atomics, so that the
result is the same in every run; the host knows no threshold, so that it need not wait for one.

Axes: B batch, H W output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.routing import LLOYD_STEPS, LLOYD_TOLERANCE, extreme_scores

# Enough to fill a GPU, and few enough for all to read what all others left.
_PROGRAMS = 512
_BLOCK = 2048
_WARPS = 8


def adaptive_classes(margins_BHW: Tensor, *, programs: int = _PROGRAMS) -> Tensor:
    """Classes (B, H, W) uint8, 1 where the score is above ADM's threshold.

    Args:
        margins_BHW: the heavy upsampler's logit minus the light one's, any float dtype; of one
            whole image with at least one pixel.
        programs: a power of two.
    """
    margins = margins_BHW.contiguous()
    classes = torch.empty_like(margins, dtype=torch.uint8)
    low, span = extreme_scores(margins)
    # The pass that finds the mean of all is one more.
    history = margins.new_empty(LLOYD_STEPS + 1, 4, dtype=torch.float64)
    partials = margins.new_empty(LLOYD_STEPS, 3, programs, dtype=torch.float64)
    with torch.cuda.device_of(margins):
        for step in range(LLOYD_STEPS + 1):
            _pass[(programs,)](
                margins,
                low,
                span,
                classes if step == LLOYD_STEPS else None,
                history,
                partials,
                margins.numel(),
                step,
                IS_FIRST=step == 0,
                TOLERANCE=LLOYD_TOLERANCE,
                PROGRAMS=programs,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
            )
    return classes


@triton.jit(do_not_specialize=["total", "step"])
def _pass(
    margins_ptr,
    low_ptr,
    span_ptr,
    classes_ptr,
    history_ptr,
    partials_ptr,
    total,
    step,
    IS_FIRST: tl.constexpr,
    TOLERANCE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Arguments: see :func:`adaptive_classes`. With classes it writes them instead of sums.

    Of each step history holds the centroids, the threshold, and whether that is final; partials
    hold each program's number of scores above the threshold, their sum, and that of the others.
    """
    program = tl.program_id(0)
    if IS_FIRST:
        # All are above, so that the centroids become 0, an empty cluster's, and the mean of all;
        # from infinity that is too far a move to be the last.
        light, heavy = tl.cast(0.0, tl.float64), tl.cast(float("inf"), tl.float64)
        threshold, is_final = tl.cast(-1.0, tl.float64), tl.cast(0, tl.int1)
    else:
        light, heavy, threshold, is_final = _next(
            history_ptr + (step - 1) * 4,
            partials_ptr + (step - 1) * (3 * PROGRAMS),
            total,
            TOLERANCE,
            PROGRAMS,
        )
    split = threshold.to(tl.float32)
    low = tl.load(low_ptr)
    span = tl.load(span_ptr)
    counts = tl.zeros((BLOCK,), tl.int32)
    sums_above = tl.zeros((BLOCK,), tl.float32)
    sums_below = tl.zeros((BLOCK,), tl.float32)
    total = total.to(tl.int64)
    start = program.to(tl.int64) * BLOCK
    if classes_ptr is None:
        # Nothing more is to be found out.
        total = tl.where(is_final, 0, total)
    for first in range(start, total, PROGRAMS * BLOCK):
        place = first + tl.arange(0, BLOCK)
        is_inside = place < total
        margin = tl.load(margins_ptr + place, mask=is_inside, other=0.0).to(tl.float32)
        score = 1.0 / (1.0 + tl.exp(-margin))
        score = tl.minimum(tl.maximum((score - low) / span, 0.0), 1.0)
        is_above = score > split
        if classes_ptr is None:
            counts += (is_inside & is_above).to(tl.int32)
            sums_above += tl.where(is_inside & is_above, score, 0.0)
            sums_below += tl.where(is_inside & (score <= split), score, 0.0)
        else:
            tl.store(classes_ptr + place, is_above.to(tl.uint8), mask=is_inside)
    if classes_ptr is None:
        partials_ptr += step * (3 * PROGRAMS) + program
        tl.store(partials_ptr, tl.sum(counts).to(tl.float64))
        tl.store(partials_ptr + PROGRAMS, tl.sum(sums_above.to(tl.float64)))
        tl.store(partials_ptr + 2 * PROGRAMS, tl.sum(sums_below.to(tl.float64)))
        if program == 0:
            history_ptr += step * 4
            tl.store(history_ptr, light)
            tl.store(history_ptr + 1, heavy)
            tl.store(history_ptr + 2, threshold)
            tl.store(history_ptr + 3, is_final.to(tl.float64))


@triton.jit
def _next(history_ptr, partials_ptr, total, TOLERANCE: tl.constexpr, PROGRAMS: tl.constexpr):
    """Centroids, threshold, and whether it is final, from those before and the sums by them."""
    program = tl.arange(0, PROGRAMS)
    above = tl.sum(tl.load(partials_ptr + program))
    sum_above = tl.sum(tl.load(partials_ptr + PROGRAMS + program))
    sum_below = tl.sum(tl.load(partials_ptr + 2 * PROGRAMS + program))
    below = total.to(tl.float64) - above
    light = tl.where(below > 0, sum_below / tl.maximum(below, 1.0), 0.0)
    heavy = tl.where(above > 0, sum_above / tl.maximum(above, 1.0), 0.0)
    light_before = tl.load(history_ptr)
    heavy_before = tl.load(history_ptr + 1)
    moved = (light - light_before) * (light - light_before)
    moved += (heavy - heavy_before) * (heavy - heavy_before)
    is_final = (moved <= TOLERANCE) | (tl.load(history_ptr + 3) > 0)
    threshold = tl.where(is_final, tl.load(history_ptr + 2), (light + heavy) / 2)
    return light, heavy, threshold, is_final
