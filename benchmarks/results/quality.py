"""PSNR, SSIM and FLOPs on the benchmark sets: each network runs once on each image.

Axes: h w LR, H W output.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from benchmarks.results.subjects import (
    CONVENTIONS,
    FIGURES,
    ROOT,
    ROUTINGS,
    Subject,
    identity,
    read_json,
    routing_of,
    watched,
    write_figures,
)
from engine.evaluation import bicubic
from engine.loading import load_original, load_pcsr
from engine.rerouted import ReroutedImage
from engine.restore import PcsrRestorer, Restored
from engine.samples import EvaluationSample, EvaluationSet, ImagePaths
from utils.checkpoint import RELEASE_NAME, load_checkpoint
from utils.config import load_config
from utils.errors import UserError
from utils.flops import executed_flops, paper_flops
from utils.metrics import psnr, ssim

BICUBIC_PATH = FIGURES / "bicubic.json"

# One image's figures by row of a table.
Rows = dict[str, dict[str, float]]
# An image and its LR on the device, to its rows.
Measure = Callable[[EvaluationSample, Tensor], Rows]


def measure_bicubic(data: Path, sets: Iterable[str], device: torch.device) -> None:
    """Figures of bicubic enlargement to results/figures/bicubic.json."""

    def measure(sample: EvaluationSample, lr: Tensor) -> Rows:
        restored = bicubic(lr, sample.size)
        return {"bicubic": quality_of(restored.sr, sample)}

    _measure_sets(BICUBIC_PATH, {"name": "bicubic"}, measure, data, sets, device)


def measure_subject(
    subject: Subject,
    weights: tuple[Path | None, Path | None],
    data: Path,
    sets: Iterable[str],
    device: torch.device,
) -> None:
    """Figures of a subject, of those of its two networks whose weights are given, to its file."""
    original_path, pcsr_path = weights
    cost_of_original = _OriginalCost(subject)
    original = pcsr = None
    about: dict[str, Any] = {"name": subject.name}
    if original_path is not None:
        original = load_original(original_path, device)
        about["original"] = _about(original, original_path)
    if pcsr_path is not None:
        pcsr = PcsrRestorer(load_pcsr(pcsr_path, device))
        about["pcsr"] = _about(pcsr.model, pcsr_path)
        phase0 = ROOT / "save" / subject.pcsr.replace("phase1", "phase0") / RELEASE_NAME
        # What is in save/ says nothing of the official weights.
        if not subject.is_official and phase0.is_file():
            about["pcsr"]["phase0_iterations"] = load_checkpoint(phase0).get("iter")

    def measure(sample: EvaluationSample, lr: Tensor) -> Rows:
        rows: Rows = {"original": cost_of_original((lr.shape[-2], lr.shape[-1]))}
        if original is not None:
            with torch.inference_mode():
                rows["original"] |= quality_of(original(lr[None])[0], sample)
        if pcsr is not None:
            rows |= _routed(pcsr, sample, lr)
        return rows

    _measure_sets(subject.figures_path, about, measure, data, sets, device)


class _OriginalCost:
    """FLOPs of a subject's original network on an image of (h, w); they need no weights."""

    def __init__(self, subject: Subject) -> None:
        config = load_config(ROOT / "configs" / f"{subject.original}.yaml")
        self._model = models.make(config.model)
        self._flops: dict[tuple[int, int], dict[str, float]] = {}

    def __call__(self, lr_size: tuple[int, int]) -> dict[str, float]:
        if lr_size not in self._flops:
            shape = (1, 3, *lr_size)
            self._flops[lr_size] = {
                "flops_paper": paper_flops(self._model, shape),
                "flops_executed": executed_flops(self._model, shape),
            }
        return dict(self._flops[lr_size])


def quality_of(sr: Tensor, sample: EvaluationSample) -> dict[str, float]:
    """PSNR of RGB and of Y, and SSIM of Y."""
    border_px = CONVENTIONS.border_px
    return {
        "psnr_rgb": psnr(sr, sample.hr, psnr_type="rgb", border_px=border_px),
        "psnr_y": psnr(sr, sample.hr, psnr_type="y", border_px=border_px),
        "ssim_y": ssim(sr, sample.hr, psnr_type="y", border_px=border_px),
    }


def _routed(restorer: PcsrRestorer, sample: EvaluationSample, lr: Tensor) -> Rows:
    image = ReroutedImage(restorer, lr, sample.size)
    lr_size = (lr.shape[-2], lr.shape[-1])
    rows = {}
    for key in ROUTINGS:
        routing = routing_of(key, restorer, lr_size, sample.size)
        restored, unrefined = (image(routing, refinement=each) for each in (True, False))
        rows[key] = {
            **quality_of(restored.sr, sample),
            "psnr_rgb_unrefined": quality_of(unrefined.sr, sample)["psnr_rgb"],
            **_cost_of(restored),
        }
    return rows


def _cost_of(restored: Restored) -> dict[str, float]:
    return {
        "flops_paper": restored.flops_paper,
        "flops_executed": restored.flops_executed,
        "heavy_share": restored.shares[-1],
    }


def _about(model: torch.nn.Module, path: Path) -> dict[str, Any]:
    return {"parameters": sum(p.numel() for p in model.parameters()), **identity(path)}


def _measure_sets(
    path: Path,
    about: Mapping[str, Any],
    measure: Measure,
    data: Path,
    sets: Iterable[str],
    device: torch.device,
) -> None:
    """Write means over each set; what the file holds of other sets stays, of the same weights."""
    before = read_json(path)
    is_same = {key: before.get(key) for key in about} == dict(about)
    measured = dict(before.get("sets", {})) if is_same else {}
    if before.get("sets") and not is_same:
        print(f"{path.name}: its figures were of other weights and go, those of all sets")
    for name in sets:
        folder = data / name / "HR"
        if not folder.is_dir():
            raise UserError(f"--data {data}: there is no {name}/HR (--sets names those there are)")
        images = EvaluationSet(ImagePaths.of_folders(folder), CONVENTIONS)
        figures = []
        for index in watched(range(len(images)), name):
            sample = images[index]
            figures.append(measure(sample, sample.lr.to(device)))
        measured[name] = {"images": len(images), "rows": _means(figures)}
        content = {**about, "conventions": CONVENTIONS.to_json(), "sets": measured}
        write_figures(path, content)


def _means(figures: list[Rows]) -> Rows:
    return {
        row: {key: statistics.fmean(of_image[row][key] for of_image in figures) for key in first}
        for row, first in figures[0].items()
    }
