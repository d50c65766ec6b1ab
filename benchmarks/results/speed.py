"""Time and memory: on one picture of a named size, and on every tenth image of BSD100.

Axes: h w LR, H W output.
"""

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Networks, Size, Source, Variant, picture
from benchmarks.measure import MemoryJob, peak_memory, round_robin
from benchmarks.results.subjects import (
    CONVENTIONS,
    ROUTINGS,
    SCALE,
    Subject,
    identities,
    routing_of,
    watched,
    write_figures,
)
from engine.rerouted import ReroutedImage
from engine.restore import PcsrRestorer, Restored
from engine.samples import EvaluationSet, ImagePaths
from models.routing import Routing
from utils.machine import Timer, describe

LR_SIZE = (276, 420)
TIMED_SET = "BSD100"
EVERY = 10

IMAGE_ROUNDS = 7

ORIGINALS: tuple[Variant, ...] = ("original", "original_optimized")
# Memory depends on whether an image is routed as a whole, not on where its pixels go.
WITH_MEMORY: dict[str, tuple[Variant, str | None]] = {
    "original": ("original", None),
    "original_optimized": ("original_optimized", None),
    "k0": ("fast", "k0"),
    "adm": ("fast", "adm"),
}


def measure_speed(
    subject: Subject,
    weights: tuple[Path | None, Path | None],
    data: Path,
    device: torch.device,
    rounds: int,
) -> None:
    """Medians of a subject's cases in turn, in fp32, to its file.

    Args:
        weights: of original and PCSR; an original without weights takes as long with random ones.
        data: folder of the benchmark sets; without BSD100 only the picture is timed.
        rounds: on the picture.
    """
    original_path, pcsr_path = weights
    source = Source(subject.backbone, pcsr_path, original_path)
    networks = Networks(source, device)
    restorer = PcsrRestorer(networks.pcsr)
    lr = picture(LR_SIZE).to(device)
    rows = _costs(networks, restorer, lr)
    for key, time_s in _times(networks, restorer, lr, rounds).items():
        rows[key]["time_s"] = time_s
    for key, peak in _memory(source, device).items():
        rows[key]["peak_memory_bytes"] = peak
    content: dict[str, Any] = {
        "name": subject.name,
        **identities(weights),
        "machine": describe(device),
        "picture": {
            "lr_height": LR_SIZE[0],
            "lr_width": LR_SIZE[1],
            "rounds": rounds,
            "rows": rows,
        },
    }
    folder = data / TIMED_SET / "HR"
    if folder.is_dir():
        images = EvaluationSet(ImagePaths.of_folders(folder), CONVENTIONS)
        indices = range(0, len(images), EVERY)
        times = [
            _times(networks, restorer, images[index].lr.to(device), IMAGE_ROUNDS)
            for index in watched(indices, subject.name)
        ]
        means = {key: {"time_s": statistics.fmean(of[key] for of in times)} for key in times[0]}
        content["images"] = {
            "set": TIMED_SET,
            "every": EVERY,
            "rounds": IMAGE_ROUNDS,
            "rows": means,
        }
    write_figures(subject.speed_path, content)


def _costs(networks: Networks, restorer: PcsrRestorer, lr: Tensor) -> dict[str, dict[str, Any]]:
    """FLOPs of all cases on an image, and PCSR's share of heavy pixels."""
    lr_size, size = _sizes(lr)
    original = networks.runner(Case(networks.source.backbone, "original", None, "fp32"))(lr, size)
    restored: dict[str, Restored] = dict.fromkeys(ORIGINALS, original)
    image = ReroutedImage(restorer, lr, size)
    restored |= {key: image(routing_of(key, restorer, lr_size, size)) for key in ROUTINGS}
    return {
        key: {
            "flops_paper": each.flops_paper,
            "flops_executed": each.flops_executed,
            "heavy_share": each.shares[-1] if each.shares else None,
        }
        for key, each in restored.items()
    }


def _times(networks: Networks, restorer: PcsrRestorer, lr: Tensor, rounds: int) -> dict[str, float]:
    """The median time of each case on one image; all are warmed up first."""
    lr_size, size = _sizes(lr)
    calls: dict[str, Callable[[], float]] = {}
    for variant in ORIGINALS:
        runner = networks.runner(Case(networks.source.backbone, variant, None, "fp32"))
        calls[variant] = functools.partial(_original_s, runner, lr, size)
    for key in ROUTINGS:
        routing = routing_of(key, restorer, lr_size, size)
        calls[key] = functools.partial(_pcsr_s, restorer, lr, size, routing)
    round_robin(calls, 1)
    times = round_robin(calls, rounds)
    return {key: statistics.median(seconds) for key, seconds in times.items()}


def _original_s(runner: Callable[[Tensor, Size], Restored], lr: Tensor, size: Size) -> float:
    return runner(lr, size).time_s


def _pcsr_s(restorer: PcsrRestorer, lr: Tensor, size: Size, routing: Routing) -> float:
    with Timer(lr.device) as timer:
        restorer.run(lr, size, routing)
    return timer.elapsed_s


def _memory(source: Source, device: torch.device) -> dict[str, int | None]:
    """Peak memory of processes that do nothing but run one case on the picture."""
    threads = torch.get_num_threads()
    peaks = {}
    for key, (variant, routing) in WITH_MEMORY.items():
        case = Case(source.backbone, variant, routing, "fp32")
        peaks[key] = peak_memory(MemoryJob(case, source, str(device), threads, LR_SIZE))
    return peaks


def _sizes(lr: Tensor) -> tuple[Size, Size]:
    """(h, w) and (H, W)."""
    lr_size = (lr.shape[-2], lr.shape[-1])
    return lr_size, (SCALE * lr_size[0], SCALE * lr_size[1])
