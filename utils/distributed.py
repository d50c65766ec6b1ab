"""Processes: set-up from torchrun's environment, reductions, and batch norm over all ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.device import pick_device
from utils.errors import UserError


@dataclass(frozen=True)
class World:
    """Who this process is.

    Attributes:
        rank: 0 to size - 1; rank 0 writes files and logs.
        size: number of processes.
        device: this process's device.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


@contextmanager
def world(device_name: str = "auto", gpu: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; one process without it.

    On GPUs each process takes the one of its LOCAL_RANK and talks through NCCL, on the CPU gloo.

    Raises:
        UserError: the device does not exist, or there are more local processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World(0, 1, pick_device(device_name, gpu))
        return
    device = pick_device(device_name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes on `{device.type}` are not supported: use --nproc 1")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def is_distributed() -> bool:
    """True where there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks (not differentiable); `values` itself with one process."""
    if not is_distributed():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return sum_over_ranks(grad)


def differentiable_sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of `values` over all ranks; every rank's gradient reaches every rank's `values`."""
    return _SumOverRanks.apply(values) if is_distributed() else values


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of all ranks' samples, on any device.

    torch's own SyncBatchNorm works on GPUs only. In eval mode, and with one process, it is
    ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and is_distributed()):
            return super().forward(x)
        dims = (0, 2, 3)
        count = sum_over_ranks(x.new_tensor(x.numel() / x.shape[1], dtype=torch.float64)).item()
        x32 = x.float()
        mean = differentiable_sum_over_ranks(x32.sum(dims)) / count
        centred = x32 - mean[:, None, None]
        var = differentiable_sum_over_ranks((centred * centred).sum(dims)) / count
        self._track(mean.detach(), var.detach() * count / max(count - 1, 1))
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_var, self.momentum)


def synchronise_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every ``BatchNorm2d`` below `module` by one over all ranks, in place."""
    for name, child in module.named_children():
        if type(child) is not nn.BatchNorm2d:
            synchronise_batch_norm(child)
            continue
        synced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
        synced.load_state_dict(child.state_dict())
        synced.train(child.training).requires_grad_(child.weight.requires_grad)
        setattr(module, name, synced.to(child.weight.device))
    return module
