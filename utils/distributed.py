"""Processes: set-up from torchrun's environment, reductions, and errors that end all of them."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.cli import EXIT_USER_ERROR, one_line
from utils.device import pick_device
from utils.errors import LostConnectionError, UserError
from utils.launch import LAUNCH_TIME

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Exit code of the ranks that leave it to rank 0 to say what is wrong: that of a user's error.
_EXIT_QUIET = EXIT_USER_ERROR
_PATIENCE = timedelta(minutes=10)


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
    def local_size(self) -> int:
        """Number of processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


@contextmanager
def world(
    device_name: str = "auto", gpu: str | None = None, *, patience: timedelta = _PATIENCE
) -> Iterator[World]:
    """Join the process group that torchrun's environment describes; one process without it.

    On GPUs each process takes the one of its LOCAL_RANK and talks through NCCL (through gloo
    where the data is on the CPU), on the CPU gloo alone.

    Args:
        device_name, gpu: see `utils.device.pick_device`.
        patience: how long a process waits for another that lives but does not answer.

    Raises:
        UserError: the device does not exist, or there are more local processes than GPUs.
        LostConnectionError: from the body: another process of the group has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if restarts() and os.environ.get("RANK") == "0":
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
        logger.warning("a process had ended: all are started again (%d of %s)", restarts(), most)
    if size == 1 or "RANK" not in os.environ:
        yield World(0, 1, pick_device(device_name, gpu))
        return
    device = pick_device(device_name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"several processes on `{device.type}` are not supported: use --nproc 1")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank = int(os.environ["RANK"])
    try:
        _join(backend, patience)
    except RuntimeError as error:
        raise LostConnectionError(
            f"process {rank} did not reach the others: {one_line(error)}"
        ) from error
    try:
        yield World(rank, size, device)
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise LostConnectionError(
            f"process {rank} lost the connection: another process of this run has ended"
        ) from error
    finally:
        dist.destroy_process_group()


def _join(backend: str, patience: timedelta) -> None:
    """Join the group.

    torchrun may keep one store for all its starts, in which their old addresses still stand. Each
    start then has a part of its own, by its number: so machines have to start equally often.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=patience)
        return
    shared, rank, size = next(dist.rendezvous("env://", timeout=patience))
    store = dist.PrefixStore(f"start-{restarts()}", shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)


def _is_lost_connection(error: RuntimeError) -> bool:
    """True for what collectives raise when a peer is gone."""
    words = ("connection", "gloo", "pair closure", "socket", "nccl")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def restarts() -> int:
    """How often torchrun has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_of_this_launch(path: Path) -> bool:
    """Whether a file was written by these processes before they were started again."""
    launched_s = float(os.environ.get(LAUNCH_TIME, "0"))
    return restarts() > 0 and path.is_file() and path.stat().st_mtime >= launched_s


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


def max_over_ranks(values: list[int]) -> list[int]:
    """The largest of each value over all ranks."""
    if not is_distributed():
        return values
    largest = torch.tensor(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in the order of ranks, on every rank."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_state(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    if is_distributed():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; where it fails on one, all end with one message.

    `action` must not talk to other ranks itself.

    Raises:
        UserError: on rank 0, where `action` fails on any rank; the others then exit quietly.
    """
    if not is_distributed():
        return action()
    try:
        result, problem = action(), None
    except (ValueError, OSError) as error:
        result, problem = None, one_line(error)
    fail_together(problem)
    return result  # type: ignore[return-value]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone, and return its result on every rank; errors as `together`."""
    is_main = not is_distributed() or dist.get_rank() == 0
    result = together(lambda: action() if is_main else None)
    return gather_objects(result)[0]


def fail_together(problem: str | None) -> None:
    """End all ranks with one message, where any of them has a `problem`. Every rank must call it.

    Raises:
        UserError: on rank 0; the other ranks exit quietly, as its message is the one to read.
    """
    problems = [found for found in gather_objects(problem) if found is not None]
    if not problems:
        return
    if is_distributed() and dist.get_rank() > 0:
        raise SystemExit(_EXIT_QUIET)
    raise UserError(problems[0])
