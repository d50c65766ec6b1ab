"""Time, memory and the machine's peak, measured so that the figures can be compared."""

import logging
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from benchmarks.cases import (
    FP32_VARIANTS,
    SCALE,
    Case,
    Networks,
    Size,
    Source,
    encoder_time_s,
    picture,
    shown,
)
from benchmarks.report import Row, add_ratios, figures_table, ratios_table
from engine.memory import is_lack_of_memory
from engine.restore import PcsrRestorer, Restored
from utils.allocator import keep_freed_blocks
from utils.cli import one_line
from utils.errors import UserError
from utils.machine import Timer, describe, peak_memory_bytes, reset_peak_memory

Key = TypeVar("Key", bound=Hashable)
Step = TypeVar("Step")

_PRODUCT_REPEATS = 31
_PRODUCT_LIMIT_S = 4.0


def round_robin(
    calls: Mapping[Key, Callable[[], float]],
    rounds: int,
    follow: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[Key, list[float]]:
    """The seconds that each call returns, `rounds` times, all calls in turn.

    What slows the machine down for a while so slows down all alike.

    Args:
        follow: passes the numbers of the rounds on, and may show them.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in follow(range(rounds)):
        for key, call in calls.items():
            times[key].append(call())
    return times


def product_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of several products of two large square matrices."""
    side = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best_s = float("inf")
    start_s = time.perf_counter()
    for _ in range(_PRODUCT_REPEATS):
        with Timer(device) as timer:
            torch.mm(a, b)
        best_s = min(best_s, timer.elapsed_s)
        if time.perf_counter() - start_s > _PRODUCT_LIMIT_S:
            break
    return 2 * side**3 / best_s


@dataclass(frozen=True)
class MemoryJob:
    """What a process needs in order to run a case.

    Attributes:
        case, source: what to run.
        device, threads: on what.
        lr_size: (h, w).
    """

    case: Case
    source: Source
    device: str
    threads: int
    lr_size: Size


def peak_memory(job: MemoryJob) -> int | None:
    """Peak memory in bytes of a process that does nothing but run the case once.

    On a CPU the resident memory, interpreter and libraries included; elsewhere what torch
    allocated on the device. None where the platform does not tell.

    Raises:
        UserError: the case cannot be run, or not with the memory there is.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_run_once, job).result()
    except BrokenProcessPool as error:
        raise UserError("its process was ended by the system: too little memory?") from error


def _run_once(job: MemoryJob) -> int | None:
    # What there is to warn of is said by the process that takes the times.
    logging.disable(logging.WARNING)
    if job.case.variant not in FP32_VARIANTS:
        keep_freed_blocks()
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    runner = Networks(job.source, device).runner(job.case)
    lr = picture(job.lr_size).to(device)
    reset_peak_memory(device)
    runner(lr, (SCALE * lr.shape[-2], SCALE * lr.shape[-1]))
    return peak_memory_bytes(device)


class Bench:
    """Measures the cases of one backbone at one size.

    Args:
        source: the networks.
        lr_size: (h, w).
        peaks: FLOPs per second of a product of two matrices, by precision.
        memory: measure peak memory, too.

    Attributes:
        left_out: how many cases could not be run so far, but for optional ones.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        lr_size: Size,
        peaks: dict[str, float],
        *,
        memory: bool,
    ) -> None:
        self.source = source
        self.device = device
        self.lr_size = lr_size
        self.size = (SCALE * lr_size[0], SCALE * lr_size[1])
        self.peaks = peaks
        self.memory = memory
        self.networks = Networks(source, device)
        self.lr = picture(lr_size).to(device)
        self.left_out = 0

    def run(self, cases: Sequence[Case], rounds: int, optional: Container[str] = ()) -> list[Row]:
        """Rows of the cases that can be run; prints why others cannot, and the table.

        Args:
            optional: routings that need not be possible.
        """
        h, w = self.lr_size
        print(f"\n{self.source.backbone}, LR {w}x{h} (width x height) to {4 * w}x{4 * h}")
        calls: dict[Any, Callable[[], float]] = {}
        prepared = {}
        for case in _followed(cases, "prepared"):
            try:
                prepared[case] = self._prepare(case, calls)
            except (UserError, RuntimeError) as error:
                if not _is_expected(error):
                    raise
                self.left_out += case.routing not in optional
                print(f"left out: {case}: {one_line(error)}", flush=True)
        times = round_robin(calls, rounds, lambda each: _followed(each, "rounds"))
        rows = [self._row(case, *measured, times) for case, measured in prepared.items()]
        add_ratios(rows)
        if rows:
            print(f"{figures_table(rows)}\n\nratios\n{ratios_table(rows)}", flush=True)
        return rows

    def _prepare(
        self, case: Case, calls: dict[Any, Callable[[], float]]
    ) -> tuple[Restored, int | None]:
        """Run once to warm up, and add to `calls`; the result without its picture, and memory."""
        peak = None
        if self.memory:
            threads = torch.get_num_threads()
            peak = peak_memory(
                MemoryJob(case, self.source, str(self.device), threads, self.lr_size)
            )
        runner = self.networks.runner(case)
        restored = runner(self.lr, self.size)
        calls[case] = lambda: runner(self.lr, self.size).time_s
        if isinstance(runner, PcsrRestorer) and case.variant == "fast":
            calls.setdefault(case.precision, lambda: encoder_time_s(runner, self.lr))
        # Pictures at all cases at once would take gigabytes.
        return replace(restored, sr=restored.sr.new_empty(0), classes=None), peak

    def _row(
        self, case: Case, restored: Restored, peak: int | None, times: dict[Any, list[float]]
    ) -> Row:
        weights = self.source.original if case.routing is None else self.source.pcsr
        encoder = times[case.precision] if case.variant == "fast" else None
        return Row.of(
            case,
            self.lr_size,
            restored,
            times[case],
            device=str(self.device),
            threads=torch.get_num_threads(),
            peak_memory_bytes=peak,
            encoder_s=encoder and statistics.median(encoder),
            matmul_peak_flops_per_s=self.peaks[case.precision],
            weights=shown(weights),
            machine=describe(self.device),
        )


def _is_expected(error: Exception) -> bool:
    """Whether a case cannot be run here, rather than the program being wrong."""
    return isinstance(error, UserError) or is_lack_of_memory(error)


def _followed(steps: Iterable[Step], unit: str) -> Iterable[Step]:
    """With a progress bar where somebody watches."""
    return tqdm(steps, unit=unit, leave=False, disable=not sys.stderr.isatty())
