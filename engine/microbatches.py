"""Sums that do not depend on how many threads and processes add them up.

Adam turns a gradient of 1e-9 into a step of the full rate, so the rounding noise of a sum taken in
another order moves weights by 1e-4 within a few iterations (measured: CARN, 2 processes of 8
against 1 of 16). On a CPU an iteration's samples are therefore always cut into the same
micro-batches. Each runs on one thread, and what they share (gradients, batch statistics, loads) is
added up in float64 in a fixed order. The cores work on a micro-batch each.

On other devices each process runs its share of the batch as a whole.

To save memory, a share may be computed in rounds, one after another. What a round needs of those
that come after it is then found in a rehearsal without gradients.
"""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from utils.distributed import sum_over_ranks

_thread = threading.local()


def sum_over_batch(values: Tensor) -> Tensor:
    """Sum of `values` over all micro-batches of all ranks, in their dtype; not differentiable."""
    meeting, index = _seat()
    if meeting is None:
        return sum_over_ranks(values)
    return meeting.total_over_rounds(index, _wide(values)).to(values.dtype)


def is_first() -> bool:
    """True in one of this process's micro-batches: what is to be done once is done there."""
    return _seat()[1] == 0


def _seat() -> "tuple[Meeting | None, int]":
    return getattr(_thread, "seat", (None, 0))


def _wide(values: Tensor) -> Tensor:
    """On a CPU in float64; elsewhere nothing depends on the order, and some have no float64."""
    return values.detach().double() if values.device.type == "cpu" else values.detach()


class _SumOverBatch(torch.autograd.Function):
    """Every micro-batch's gradient reaches every micro-batch's values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.seat = _seat()
        return sum_over_batch(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # The seat is that of the forward pass: on a GPU, gradients have a thread of their own.
        meeting, index = ctx.seat
        if meeting is None:
            return sum_over_ranks(grad)
        # Later rounds are not known yet, but a sum means the same to the losses of all rounds.
        return meeting.total(index, _wide(grad)).to(grad.dtype) * meeting.rounds


def differentiable_sum_over_batch(values: Tensor) -> Tensor:
    """:func:`sum_over_batch` with gradients.

    In rounds, a loss must depend on the sum alone where it depends on it.
    """
    return _SumOverBatch.apply(values)


class Meeting:
    """Where the threads of one process's micro-batches wait for each other and add something up.

    Args:
        parties: micro-batches in this process; each has a thread.
        cores: how many threads compute at a time.
        rounds: parts of this process's samples that are computed one after another, each cut into
            `parties` micro-batches.
    """

    def __init__(self, parties: int, cores: int, rounds: int = 1) -> None:
        self.rounds = rounds
        self._barrier = threading.Barrier(parties, action=self._add)
        self._cores = threading.Semaphore(cores)
        self._values: list[Tensor | None] = [None] * parties
        self._total: Tensor | None = None
        # Sums over all rounds, in the order of the calls of one round.
        self._sums: list[Tensor] = []
        self._rehearses = False

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """While entered, every round runs once without gradients: what they share is added up."""
        self._sums, self._rehearses = [], True
        try:
            yield
        finally:
            self._rehearses = False

    @property
    def shares_sums(self) -> bool:
        """True where the last rehearsal met sums over the batch."""
        return bool(self._sums)

    @contextlib.contextmanager
    def seat(self, index: int) -> Iterator[None]:
        """The calling thread computes micro-batch `index`; if it fails, no one waits for it."""
        _thread.seat, _thread.calls = (self, index), itertools.count()
        try:
            with self._cores:
                yield
        except BaseException:
            self._barrier.abort()
            raise
        finally:
            del _thread.seat, _thread.calls

    def total_over_rounds(self, index: int, values: Tensor) -> Tensor:
        """:meth:`total` over all rounds, of which those to come are known from the rehearsal."""
        if self.rounds == 1:
            return self.total(index, values)
        call = next(_thread.calls)
        if not self._rehearses:
            return self._sums[call]
        total = self.total(index, values)
        # All threads have the same total; one of them notes it.
        if index == 0:
            if call == len(self._sums):
                self._sums.append(torch.zeros_like(total))
            self._sums[call] += total
        return total

    def total(self, index: int, values: Tensor) -> Tensor:
        """The sum of all threads' values over all ranks, added in the order of the indices."""
        self._values[index] = values
        self._cores.release()
        try:
            self._barrier.wait()
        finally:
            self._cores.acquire()
        assert self._total is not None
        return self._total

    def _add(self) -> None:
        self._total = sum_over_ranks(torch.stack(self._values).sum(dim=0))  # type: ignore[arg-type]
