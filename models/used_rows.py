"""Rows of a strip that an upsampler has to compute, where those that it need not are left out.

Axes: r rows of the strip.
"""

import torch
from torch import Tensor


class UsedRows:
    """Some rows of a strip: those that an upsampler has to compute.

    Args:
        is_used: (r,) bool.

    Attributes:
        count: how many are used.
        are_all: all of them.
    """

    def __init__(self, is_used: Tensor) -> None:
        self.is_used = is_used
        self._index = is_used.nonzero()[:, 0]
        self.count = len(self._index)
        self.are_all = self.count == len(is_used)

    @classmethod
    def at(cls, rows: Tensor, count: int) -> "UsedRows":
        """Those of `count` rows that occur in `rows`, int64 of any length."""
        is_used = torch.zeros(count, dtype=torch.bool, device=rows.device)
        return cls(is_used.index_fill_(0, rows, True))

    def of(self, values: Tensor) -> Tensor:
        """The used rows of (r, ...)."""
        return values if self.are_all else values[self._index]

    def put(self, values: Tensor, out: Tensor, dim: int) -> Tensor:
        """`out` with used rows at their places along an axis; all of them are `values` itself."""
        return values if self.are_all else out.index_copy_(dim, self._index, values)

    def place(self, rows: Tensor) -> Tensor:
        """Where used rows are among the used ones."""
        return rows if self.are_all else (self.is_used.cumsum(0) - 1)[rows]
