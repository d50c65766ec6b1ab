"""Routing to a budget: heavier upsamplers for the pixels that want them most, until it is used up.

With two upsamplers the order is that of the margins. With more it is that of k: by
``argmax_j m_j - k d_j`` (m_j the margins, d_j the logarithms of the relative costs) a pixel gets
upsampler j or a heavier one where ``k < kappa_j``,

    kappa_j = max over i >= j of  min over l < j of  (m_i - m_l) / (d_i - d_l),

so that one threshold on the M - 1 maps kappa_j decides about all pixels.

Axes: B patches of *one* image (or the image), M upsamplers, K = M - 1, H W output.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.budget_search import Raising
from models.cost import UpsamplingCost, row_chunks
from utils.errors import UserError


@dataclass(frozen=True)
class BudgetRouting:
    """The image's cost as near below `budget` as its pixels allow.

    All pixels start light; the largest margins (with more than two upsamplers: the largest k) are
    raised first, equal ones in the order of the pixels, until the next would exceed the budget.
    What is left of it is less than one pixel and, where that pixel is the first of its class in
    its strip, the strip cost. Below the cost of all-light the result is all-light.

    Attributes:
        cost: of this image.
        budget: in the same unit.
        words: for :meth:`describe`.
    """

    is_global: ClassVar[bool] = True
    cost: UpsamplingCost
    budget: float
    words: str = "budget"

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See `models.routing.Routing`; all patches of the image at once."""
        if any(heavier < lighter for lighter, heavier in itertools.pairwise(log_costs_M)):
            raise UserError("a budget needs upsamplers that are ordered light to heavy")
        return Raising(raise_order(margins_BKHW, log_costs_M), self.cost).up_to(self.budget)

    def describe(self) -> str:
        return self.words


def raise_order(margins_BKHW: Tensor, slopes_M: Sequence[float]) -> Tensor:
    """kappa (B, K, H, W) float32: which pixels are raised to class j = 1..M-1 first.

    Never increasing in j. Pixels without order (nan) come last.

    Args:
        margins_BKHW: value of each upsampler relative to the lightest; of one, only the order
            counts, so that it comes back as it is.
        slopes_M: what k times the value is weighed against; not decreasing.
    """
    if margins_BKHW.shape[1] == 1:
        return margins_BKHW.float()
    kappa_BKHW = torch.empty_like(margins_BKHW, dtype=torch.float32)
    for rows in row_chunks(margins_BKHW):
        margins = margins_BKHW[:, :, rows].float().unbind(1)
        values = [torch.zeros_like(margins[0]), *margins]
        reached: Tensor | None = None
        for j in range(1, len(values)):
            each = (_wanted(values, slopes_M, i, j) for i in range(j, len(values)))
            best = functools.reduce(torch.maximum, each)
            # They cannot increase but by rounding.
            reached = best if reached is None else torch.minimum(best, reached)
            kappa_BKHW[:, j - 1, rows] = reached
    return kappa_BKHW


def _wanted(values: Sequence[Tensor], slopes_M: Sequence[float], i: int, j: int) -> Tensor:
    """The k below which upsampler `i` is better than all those below `j`."""
    ratios = []
    for low in range(j):
        slope = slopes_M[i] - slopes_M[low]
        ratio = (values[i] - values[low]) / slope
        ratios.append(ratio if slope else ratio.nan_to_num_(-math.inf, math.inf, -math.inf))
    return functools.reduce(torch.minimum, ratios)
