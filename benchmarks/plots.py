"""PSNR against executed FLOPs and against time, on a folder of pictures.

Axes: h w LR, H W output.
"""

import importlib.util
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cases import SCALE, Case, Networks, Source
from benchmarks.measure import round_robin
from benchmarks.report import format_table
from engine.budget import OriginalCost
from engine.conventions import Conventions
from engine.restore import PcsrRestorer
from engine.samples import EvaluationSet, ImagePaths
from utils.atomic import replace_file, write_text
from utils.errors import UserError
from utils.metrics import psnr

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROUTINGS = ("heavy", "k0", "k1", "adm", "light")
_BUDGETS = 6
# What stands apart from the line of budgets: label, marker, colour.
_STYLES = {
    "original": ("original as published", "X", "black"),
    "original_optimized": ("original, optimised", "P", "tab:gray"),
    "heavy": ("PCSR, all heavy", "^", "tab:red"),
    "adm": ("PCSR, ADM", "D", "tab:green"),
    "k0": ("PCSR, k = 0", "o", "tab:orange"),
    "k1": ("PCSR, k = 1", "s", "tab:purple"),
    "light": ("PCSR, all light", "v", "tab:cyan"),
}


@dataclass(frozen=True)
class Point:
    """Means over the images.

    Attributes:
        backbone: registry name.
        label: original, original_optimized, or PCSR's routing.
        psnr: RGB, in dB.
        flops_paper, flops_executed: see `utils.flops`.
        time_s: of medians.
    """

    backbone: str
    label: str
    psnr: float
    flops_paper: float
    flops_executed: float
    time_s: float


def check(plot: Path, json_path: Path | None) -> None:
    """Refuse, before anything is measured, what would fail in the end."""
    if json_path is not None and json_path.resolve() == plot.with_suffix(".json").resolve():
        raise UserError(f"--json {json_path} is where the figures of --plot {plot} go")
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")


def measure_and_plot(
    sources: Sequence[Source],
    hr_data: Path,
    plot: Path,
    device: torch.device,
    rounds: int,
) -> None:
    """Run all images in fp32, print the means, write `plot` and a JSON file beside it.

    Args:
        sources: one panel each.
        hr_data: folder of HR images; LR is made by bicubic, images are run whole.
        rounds: for each image, all cases in turn.
    """
    conventions = Conventions(SCALE, "rgb", "bicubic float", crop=False, per_image=True)
    images = EvaluationSet(ImagePaths.of_folders(hr_data), conventions)
    points = [point for source in sources for point in measure(source, images, device, rounds)]
    print(f"\n{hr_data}, {len(images)} images, means ({conventions.describe()})")
    print(_table(points), flush=True)
    content = [asdict(point) for point in points]
    write_text(plot.with_suffix(".json"), json.dumps(content, indent=2, allow_nan=False) + "\n")
    figure = draw(points, _title(sources, hr_data, len(images), device))
    with replace_file(plot) as temporary:
        figure.savefig(temporary, dpi=150)


def measure(
    source: Source, images: EvaluationSet, device: torch.device, rounds: int
) -> list[Point]:
    """Points of a backbone: both forms of the original, then PCSR's routings and budgets."""
    networks = Networks(source, device)
    runners = {
        name: networks.runner(Case(source.backbone, name, None, "fp32"))
        for name in ("original", "original_optimized")
    }
    for routing in (*_ROUTINGS, *_budgets_between(networks, images)):
        runners[routing] = networks.runner(Case(source.backbone, "fast", routing, "fp32"))
    figures: dict[str, list[tuple[float, ...]]] = {label: [] for label in runners}
    for index in range(len(images)):
        for label, found in _measure_image(images, index, runners, device, rounds).items():
            figures[label].append(found)
    return [
        Point(source.backbone, label, *map(statistics.fmean, zip(*found, strict=True)))
        for label, found in figures.items()
    ]


def _measure_image(
    images: EvaluationSet,
    index: int,
    runners: dict[str, Any],
    device: torch.device,
    rounds: int,
) -> dict[str, tuple[float, ...]]:
    """PSNR, both FLOPs and the median time of each runner on one image."""
    sample = images[index]
    lr = sample.lr.to(device)
    border_px = images.conventions.border_px
    found = {}
    for label, runner in runners.items():
        try:
            restored = runner(lr, sample.size)
        except UserError as error:
            raise UserError(f"{label}, image {sample.name}: {error}") from error
        quality = psnr(restored.sr, sample.hr, psnr_type="rgb", border_px=border_px)
        found[label] = (quality, restored.flops_paper, restored.flops_executed)
    calls = {
        label: lambda runner=runner: runner(lr, sample.size).time_s
        for label, runner in runners.items()
    }
    times = round_robin(calls, rounds)
    return {label: (*found[label], statistics.median(times[label])) for label in runners}


def _budgets_between(networks: Networks, images: EvaluationSet) -> list[str]:
    """Budgets that all images can keep and none of them exceeds, evenly spaced."""
    restorer = networks.runner(Case(networks.source.backbone, "fast", "k0", "fp32"))
    assert isinstance(restorer, PcsrRestorer)
    original = OriginalCost(networks.source.backbone, networks.original)
    least, most = 0.0, math.inf
    for index in range(len(images)):
        H, W = images[index].size
        lr_size = (H // SCALE, W // SCALE)
        cost, one = restorer.image_cost(lr_size, (H, W)), original.executed(lr_size, (H, W))
        least, most = max(least, cost.uniform(0) / one), min(most, cost.uniform(-1) / one)
    amounts = (least + (most - least) * i / (_BUDGETS + 1) for i in range(1, _BUDGETS + 1))
    return list(dict.fromkeys(f"budget:{amount:.2f}" for amount in amounts))


def _title(sources: Sequence[Source], hr_data: Path, images: int, device: torch.device) -> str:
    where = f"{device}, threads: {torch.get_num_threads()}" if device.type == "cpu" else f"{device}"
    untrained = [each.backbone for each in sources if None in (each.pcsr, each.original)]
    warning = f"\nnot trained: {', '.join(untrained)}" if untrained else ""
    return f"x{SCALE} on {images} images of {hr_data}; {where}; fp32{warning}"


def _table(points: Sequence[Point]) -> str:
    lines = [
        [
            point.backbone,
            point.label,
            f"{point.psnr:.3f}",
            f"{point.flops_paper / 1e9:.3f}",
            f"{point.flops_executed / 1e9:.3f}",
            f"{point.time_s:.4f}",
        ]
        for point in points
    ]
    titles = ["backbone", "case", "PSNR dB", "GF paper", "GF exec.", "time s"]
    return format_table(titles, lines, left=2)


def draw(points: Sequence[Point], title: str) -> "Figure":
    """A row of two panels for each backbone."""
    from matplotlib.figure import Figure

    by_backbone = {
        name: list(group) for name, group in itertools.groupby(points, lambda p: p.backbone)
    }
    count = len(by_backbone)
    figure = Figure(figsize=(11, 1.2 + 4.2 * count), layout="constrained")
    panels = figure.subplots(count, 2, sharey="row", squeeze=False)
    for (flops, time), (name, group) in zip(panels, by_backbone.items(), strict=True):
        # Its FLOPs are the original's.
        others = [point for point in group if point.label != "original_optimized"]
        _draw_panel(flops, others, [point.flops_executed / 1e9 for point in others])
        _draw_panel(time, group, [1e3 * point.time_s for point in group])
        flops.set(
            title=f"{name}\nquality and compute",
            xlabel="executed GFLOPs per image",
            ylabel="RGB PSNR in dB",
        )
        time.set(title=f"{name}\nquality and time", xlabel="time per image in ms")
    figure.suptitle(title)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_panel(axes: "Axes", points: Sequence[Point], xs: Sequence[float]) -> None:
    """Markers, and a line through the budgets."""
    budgets = [
        (x, point.psnr) for x, point in zip(xs, points, strict=True) if point.label not in _STYLES
    ]
    if budgets:
        axes.plot(
            *zip(*budgets, strict=True), ".-", color="tab:blue", label="PCSR, budgets", zorder=2
        )
    for x, point in zip(xs, points, strict=True):
        if point.label in _STYLES:
            label, marker, colour = _STYLES[point.label]
            style: dict[str, Any] = {"edgecolor": colour, "marker": marker, "label": label}
            # Not filled: k = 0 and ADM are often in one place.
            axes.scatter(x, point.psnr, s=70, zorder=3, facecolor="none", linewidth=1.8, **style)
    axes.set_xlim(left=0)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
