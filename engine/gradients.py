"""The gradient of one iteration, over all micro-batches of all processes."""

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from engine.batch_norm import synchronise_batch_norm
from engine.microbatches import Meeting
from utils.distributed import World, sum_over_ranks

Losses = dict[str, Tensor]

# Enough for the cores of a small machine, and few enough that operations stay worth their while:
# FSRCNN takes 1.0 times as long in 4 pieces as in one, 1.2 times in 8 and 1.4 times in 16.
DEFAULT_MICROBATCHES = 4


class BatchGradients:
    """Computes the gradient of an objective's ``loss`` over the batches of all ranks.

    A context manager: threads live while it is entered.

    Args:
        objective: takes (lr, hr), returns scalars by name, "loss" among them, each a mean over
            the samples that it was given.
        parameters: whose ``grad`` is set.
        world: where to compute.
        batch_size: over all ranks.
        microbatches: how many of them all ranks together cut a batch into on the CPU, if they
            divide it; 1 leaves it whole, on as many threads as torch uses. Default: 4, but 1 in
            bf16, whose rounding is coarser than what is gained.
        precision: "fp32" or "bf16" (autocast).
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
    ) -> None:
        self._objective = objective
        self._parameters = list(parameters)
        self._world = world
        self._precision = precision
        self._pool: ThreadPoolExecutor | None = None
        self._threads = torch.get_num_threads()
        if microbatches is None:
            microbatches = DEFAULT_MICROBATCHES if precision == "fp32" else 1
        self._count = world.size
        self._own = 0
        if world.device.type == "cpu" and microbatches > 1:
            count = math.gcd(batch_size, microbatches)
            self._count = count if count % world.size == 0 else world.size
            self._own = self._count // world.size
            self._meeting = Meeting(self._own, min(self._own, self._threads))
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
            the objective's values, detached, as means over all ranks' samples.
        """
        if self._own == 0 and self._count == 1:
            return self._whole(lr, hr)
        total, names = self._added_up(lr, hr) if self._own else self._flat(lr, hr)
        total = sum_over_ranks(total) / self._count
        sizes = [parameter.numel() for parameter in self._parameters]
        *grads, losses = total.split([*sizes, len(names)])
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(grad.view_as(parameter))
        return dict(zip(names, losses.unbind(), strict=True))

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
        for parameter in self._parameters:
            parameter.grad = None
        with torch.autocast(lr.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            losses = self._objective(lr, hr)
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def _flat(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, list[str]]:
        """Gradients and losses of a few samples as one vector, and the losses' names."""
        # No cache of cast weights: threads would share it, and their graphs with it.
        with torch.autocast(
            lr.device.type,
            torch.bfloat16,
            enabled=self._precision == "bf16",
            cache_enabled=self._own == 0,
        ):
            losses = self._objective(lr, hr)
        grads = torch.autograd.grad(losses["loss"], self._parameters)
        values = torch.stack([value.detach().float() for value in losses.values()])
        return torch.cat([*(grad.flatten() for grad in grads), values]), list(losses)

    def _added_up(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, list[str]]:
        assert self._pool is not None
        pieces = zip(lr.chunk(self._own), hr.chunk(self._own), strict=True)
        # Copies: the address of a slice decides which kernel some libraries take.
        futures = [
            self._pool.submit(self._seated, index, piece_lr.clone(), piece_hr.clone())
            for index, (piece_lr, piece_hr) in enumerate(pieces)
        ]
        self._raise_first_error(futures)
        total, names = futures[0].result()
        total = total.double()
        for future in futures[1:]:
            total += future.result()[0]
        return total, names

    def _seated(self, index: int, lr: Tensor, hr: Tensor) -> tuple[Tensor, list[str]]:
        with self._meeting.seat(index):
            return self._flat(lr, hr)

    @staticmethod
    def _raise_first_error(futures: list[Future]) -> None:
        errors = [error for future in futures if (error := future.exception())]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        if errors:
            raise errors[0]
