"""The gradient of one iteration, over all micro-batches of all processes."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from engine.batch_norm import synchronise_batch_norm, uses_batch_statistics
from engine.captured import CapturedStep, Compute, Step
from engine.microbatches import Meeting
from utils.distributed import World, sum_over_ranks
from utils.errors import UserError

logger = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Objective = Callable[[Tensor, Tensor], Losses]
# Numbers of some samples as one vector, and the names of the last of them, the losses.
Flat = tuple[Tensor, list[str]]

# Enough for the cores of a small machine, and few enough that operations stay worth their while:
# FSRCNN takes 1.0 times as long in 4 pieces as in one, 1.2 times in 8 and 1.4 times in 16.
DEFAULT_MICROBATCHES = 4


class BatchGradients:
    """Computes the gradient of an objective's ``loss`` over the batches of all ranks.

    A context manager: threads live while it is entered.

    Args:
        objective: takes (lr, hr), returns scalars by name, "loss" among them, each a mean over
            the samples that it was given. Its batch norms are made to see the whole batch.
        parameters: whose ``grad`` is set.
        world: where to compute.
        batch_size: over all ranks.
        microbatches: how many of them all ranks together cut a batch into on the CPU, if they
            divide it; 1 leaves it whole, on as many threads as torch uses. Default: 4, but 1 in
            bf16, whose rounding is coarser than what is gained.
        precision: "fp32" or "bf16" (autocast).
        rounds: parts that a batch is computed in one after another, each cut into micro-batches.
        clip: the largest norm of the gradient over all parameters; None for any.
        run: what to call in place of `objective`: itself, compiled.
        capture: compute by CUDA graphs (see `engine.captured`); for one process on a GPU, and a
            batch that is computed as a whole.

    Raises:
        UserError: rounds that do not divide the batch, or that batch norm has no way to go.
    """

    def __init__(
        self,
        objective: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        world: World,
        batch_size: int,
        microbatches: int | None = None,
        precision: str = "fp32",
        rounds: int = 1,
        clip: float | None = None,
        run: Objective | None = None,
        capture: bool = False,
    ) -> None:
        self._compute: Compute = CapturedStep(self._computed) if capture else self._computed
        self._objective: Objective = run or objective
        self._parameters = list(parameters)
        self._precision = precision
        self._rounds = rounds
        self._clip = clip
        self._pool: ThreadPoolExecutor | None = None
        self._threads = torch.get_num_threads()
        if rounds > 1:
            _check_rounds(objective, rounds, batch_size, world)
        asked = microbatches
        if microbatches is None:
            microbatches = DEFAULT_MICROBATCHES if precision == "fp32" else 1
        self._count = world.size
        self._own = 0
        if world.device.type == "cpu" and microbatches > 1:
            count = math.gcd(batch_size // rounds, microbatches)
            self._count = count if count % world.size == 0 else world.size
            if asked and self._count != asked:
                logger.warning(
                    "`microbatches: %d` does not go into parts of %d samples: there are %d",
                    asked,
                    batch_size // rounds,
                    self._count,
                )
            # In one piece a batch has all threads, but for ranks that add up theirs.
            self._own = self._count // world.size if self._count > 1 else 0
        parties = max(self._own, 1)
        self._meeting = Meeting(parties, min(parties, self._threads), rounds)
        self._rehearses = rounds > 1
        if self._count > 1:
            synchronise_batch_norm(objective)

    def __enter__(self) -> "BatchGradients":
        if self._own:
            torch.set_num_threads(1)
            self._pool = ThreadPoolExecutor(
                self._own, initializer=torch.set_num_threads, initargs=(1,)
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(self._threads)

    def __call__(self, lr: Tensor, hr: Tensor) -> Losses:
        """Set every parameter's ``grad``. To be called within ``with``, which holds the threads.

        Args:
            lr, hr: this rank's (B, 3, h, w) and (B, 3, H, W).

        Returns:
            the objective's values, detached, as means over all ranks' samples; and "grad_norm",
            the gradient's norm before it was clipped. Nothing is read from the device.
        """
        if self._own == 0 and self._count == 1 and self._rounds == 1:
            losses = self._whole(lr, hr)
        else:
            losses = self._summed(lr, hr)
        grads = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(grads)
        if self._clip is not None:
            clip_grads_with_norm_(self._parameters, self._clip, norm)
        return {**losses, "grad_norm": norm}

    @contextlib.contextmanager
    def all_threads(self) -> Iterator[None]:
        """Let operations use all cores, which training gives to micro-batches."""
        if self._pool is None:
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def _whole(self, lr: Tensor, hr: Tensor) -> Losses:
        losses, grads = self._compute(lr, hr)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            parameter.grad = grad
        return losses

    def _computed(self, lr: Tensor, hr: Tensor) -> Step:
        """Losses and gradients of a batch as a whole."""
        for parameter in self._parameters:
            parameter.grad = None
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            losses = self._objective(lr, hr)
        losses["loss"].backward()
        grads = [parameter.grad for parameter in self._parameters]
        return {name: value.detach() for name, value in losses.items()}, grads

    def _summed(self, lr: Tensor, hr: Tensor) -> Losses:
        """The gradient as the sum of that of all rounds, micro-batches and ranks."""
        parts = list(zip(lr.chunk(self._rounds), hr.chunk(self._rounds), strict=True))
        if self._rehearses:
            with self._meeting.rehearsal():
                for part in parts:
                    self._part(self._values, *part)
            # Whether an objective shares anything does not change.
            self._rehearses = self._meeting.shares_sums
        total, names = self._part(self._gradients, *parts[0])
        for part in parts[1:]:
            total += self._part(self._gradients, *part)[0]
        total = sum_over_ranks(total) / (self._count * self._rounds)
        sizes = [parameter.numel() for parameter in self._parameters]
        *grads, losses = total.split([*sizes, len(names)])
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(grad.view_as(parameter))
        return dict(zip(names, losses.unbind(), strict=True))

    def _part(self, compute: Callable[[Tensor, Tensor], Flat], lr: Tensor, hr: Tensor) -> Flat:
        """`compute` of the samples of one round, added up over this rank's micro-batches."""
        if self._own:
            return self._added_up(compute, lr, hr)
        if self._rounds == 1:
            return compute(lr, hr)
        return self._seated(compute, 0, lr, hr)

    @torch.no_grad()
    def _values(self, lr: Tensor, hr: Tensor) -> Flat:
        """The losses of a few samples."""
        losses = self._forward(lr, hr)
        return torch.stack([value.float() for value in losses.values()]), list(losses)

    def _gradients(self, lr: Tensor, hr: Tensor) -> Flat:
        """Gradients and losses of a few samples."""
        losses = self._forward(lr, hr)
        grads = torch.autograd.grad(losses["loss"], self._parameters)
        values = torch.stack([value.detach().float() for value in losses.values()])
        return torch.cat([*(grad.flatten() for grad in grads), values]), list(losses)

    def _forward(self, lr: Tensor, hr: Tensor) -> Losses:
        # No cache of cast weights: threads would share it, and their graphs with it.
        with torch.autocast(
            lr.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=self._own == 0,
        ):
            return self._objective(lr, hr)

    def _added_up(self, compute: Callable[[Tensor, Tensor], Flat], lr: Tensor, hr: Tensor) -> Flat:
        assert self._pool is not None
        pieces = zip(lr.chunk(self._own), hr.chunk(self._own), strict=True)
        # Copies: the address of a slice decides which kernel some libraries take.
        futures = [
            self._pool.submit(self._seated, compute, index, piece_lr.clone(), piece_hr.clone())
            for index, (piece_lr, piece_hr) in enumerate(pieces)
        ]
        self._raise_first_error(futures)
        total, names = futures[0].result()
        total = total.double()
        for future in futures[1:]:
            total += future.result()[0]
        return total, names

    def _seated(
        self, compute: Callable[[Tensor, Tensor], Flat], index: int, lr: Tensor, hr: Tensor
    ) -> Flat:
        with self._meeting.seat(index):
            return compute(lr, hr)

    @staticmethod
    def _raise_first_error(futures: list[Future]) -> None:
        errors = [error for future in futures if (error := future.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        if errors:
            raise errors[0]


def _check_rounds(objective: nn.Module, rounds: int, batch_size: int, world: World) -> None:
    if batch_size % (rounds * world.size):
        over = f" over {world.size} processes" if world.size > 1 else ""
        raise UserError(
            f"config: `accumulate` is {rounds}, which does not divide the batch of {batch_size}"
            f"{over}"
        )
    if uses_batch_statistics(objective):
        raise UserError(
            "config: `accumulate` is not possible with this model: its batch norm needs the whole "
            "batch at once; leave `accumulate` out and lower `train_dataset.batch_size`"
        )
