"""Quality against cost over the whole range of budgets, in one pass over the data.

Of each image, features and all upsamplers' outputs are computed once; a point on a curve then only
chooses each pixel's class, puts the picture together and compares it.

Axes: B patches of *one* image (or the image), M upsamplers, K = M - 1, h w LR, H W output.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from engine.conventions import Conventions
from engine.finite import check_finite
from engine.prepared import PreparedImage
from engine.restore import PcsrRestorer
from engine.samples import EvaluationSample
from engine.timing import PixelTimes
from models.budget import BudgetRouting
from models.cost import count_rows
from models.refinement import refine
from models.routing import AdaptiveRouting, KRouting, Routing
from utils.images import to_tensor
from utils.machine import Timer
from utils.metrics import json_number, psnr

Curve = Literal["budget", "oracle", "mark"]

STEPS = 20
# BT.601, as in utils.metrics; their scale does not matter here.
_LUMA = (65.481, 128.553, 24.966)


@dataclass(frozen=True)
class Point:
    """One way of routing every image.

    Attributes:
        curve: "budget" raises the pixels with the largest margins, "oracle" those whose error
            falls most, which takes the HR image; "mark" is a routing of its own.
        name: in a table.
        share: of the way from all-light to all-heavy; None for marks.
        routing: of marks.
    """

    curve: Curve
    name: str
    share: float | None = None
    routing: Routing | None = None


@dataclass(frozen=True)
class PointFigures:
    """What is measured at a point, of one image or as the mean over images.

    Attributes:
        psnr: in dB.
        flops_paper, flops_executed: see `utils.flops`.
        shares: share of the computed pixels per upsampler, light to heavy.
        time_s: from LR on the device to SR, estimated or measured.
    """

    psnr: float
    flops_paper: float
    flops_executed: float
    shares: list[float]
    time_s: float

    @classmethod
    def mean(cls, figures: Sequence["PointFigures"]) -> "PointFigures":
        """The mean of every figure."""
        return cls(
            psnr=statistics.fmean(f.psnr for f in figures),
            flops_paper=statistics.fmean(f.flops_paper for f in figures),
            flops_executed=statistics.fmean(f.flops_executed for f in figures),
            shares=[statistics.fmean(s) for s in zip(*(f.shares for f in figures), strict=True)],
            time_s=statistics.fmean(f.time_s for f in figures),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for an infinite PSNR."""
        return {**vars(self), "psnr": json_number(self.psnr)}


def points_for(upsamplers: int) -> list[Point]:
    """The marks, then both curves from all-light to all-heavy."""
    marks = [Point("mark", f"k = {k:g}", routing=KRouting(k)) for k in (0.0, 1.0)]
    if upsamplers == 2:
        marks.append(Point("mark", "ADM", routing=AdaptiveRouting()))
    curves: tuple[Curve, ...] = ("budget", "oracle")
    shares = [step / STEPS for step in range(STEPS + 1)]
    return marks + [Point(curve, f"{curve} {s:.0%}", s) for curve in curves for s in shares]


@torch.inference_mode()
def sweep_image(
    restorer: PcsrRestorer,
    sample: EvaluationSample,
    points: Sequence[Point],
    device: torch.device,
    conventions: Conventions,
    *,
    is_timed: bool,
) -> list[PointFigures]:
    """All points of one image.

    Args:
        restorer: the model; its own routing plays no part.
        is_timed: run each point for real to measure its time; otherwise it is put together from
            the parts' times.
    """
    swept = _Swept(restorer, sample, device, conventions)
    pairs = [swept.figures(point) for point in points]
    if is_timed:
        return [replace(figures, time_s=swept.measured_s(seen)) for figures, seen in pairs]
    # The same for every point of a kind but for chance.
    refined_s = statistics.median(seen.refined_s for _, seen in pairs)
    of_curves_s = [seen.routed_s for _, seen in pairs if seen.point.share is not None]
    results = []
    for figures, seen in pairs:
        is_mark = seen.point.share is None
        routed_s = seen.routed_s if is_mark else statistics.median(of_curves_s)
        time_s = swept.prepared.before_s + routed_s + seen.upsampled_s + refined_s
        results.append(replace(figures, time_s=time_s))
    return results


@dataclass(frozen=True)
class _Seen:
    """What a point's time is made of.

    Attributes:
        routing: its routing; the oracle's choice where that is a known one.
        routed_s, refined_s: measured.
        upsampled_s: estimated.
    """

    point: Point
    routing: Routing
    routed_s: float
    refined_s: float
    upsampled_s: float


class _Swept:
    """One image with everything that its points have in common."""

    def __init__(
        self,
        restorer: PcsrRestorer,
        sample: EvaluationSample,
        device: torch.device,
        conventions: Conventions,
    ) -> None:
        self.restorer = restorer
        self.sample = sample
        self.conventions = conventions
        self.lr = sample.lr.to(device)
        self.prepared = prepared = PreparedImage(restorer, self.lr, sample.size)
        lr_size = (self.lr.shape[-2], self.lr.shape[-1])
        self.log_costs = restorer.cost.log_costs(lr_size, sample.size)
        self.at_once = restorer.image_cost(lr_size, sample.size, is_global=False)
        shape = (len(prepared.margins_BKHW), *prepared.margins_BKHW.shape[2:])
        uniform = [
            prepared.upsample(torch.full(shape, index, dtype=torch.uint8, device=device))
            for index in range(len(self.log_costs))
        ]
        self.sr_M = [sr for sr, _ in uniform]
        for sr in self.sr_M:
            check_finite(sr)
        mixed = KRouting(0.0).classes(prepared.margins_BKHW, self.log_costs)
        _, mixed_s = prepared.upsample(mixed)
        self.pixel_times = PixelTimes.fit(
            prepared.image,
            [elapsed_s for _, elapsed_s in uniform],
            mixed_s,
            count_rows(mixed, len(self.sr_M)),
        )
        self.gains_BKHW = self._gains()

    def figures(self, point: Point) -> tuple[PointFigures, _Seen]:
        """Route, put together, compare; the time is left open."""
        prepared, conventions = self.prepared, self.conventions
        values, slopes = prepared.margins_BKHW, self.log_costs
        if point.curve == "oracle":
            values, slopes = self.gains_BKHW, prepared.image.cost.pixel
        routing = self._routing(point)
        with Timer(self.lr.device) as routed:
            classes = routing.classes(values, slopes)
        sr = self._chosen(classes)
        with Timer(self.lr.device) as refined:
            sr = refine(sr, classes) if self.restorer.refinement else sr
        image = prepared.image if routing.is_global else self.at_once
        counts_BHM = count_rows(classes, len(self.sr_M))
        pixels_M = counts_BHM.sum(axis=(0, 1))
        known = _Known(classes) if point.curve == "oracle" else routing
        upsampled_s = self.pixel_times.cost(prepared.image).total(counts_BHM)
        seen = _Seen(point, known, routed.elapsed_s, refined.elapsed_s, upsampled_s)
        figures = PointFigures(
            psnr=psnr(
                prepared.whole(sr),
                self.sample.hr,
                psnr_type=conventions.psnr_type,
                border_px=conventions.border_px,
            ),
            flops_paper=self.restorer.cost.paper_total(
                image.lr_size, pixels_M.tolist(), patches=image.patches
            ),
            flops_executed=image.cost.total(counts_BHM),
            shares=(pixels_M / pixels_M.sum()).tolist(),
            time_s=math.nan,
        )
        return figures, seen

    def measured_s(self, seen: _Seen) -> float:
        """What a point takes when it is run for real."""
        with Timer(self.lr.device) as timer:
            self.restorer.run(self.lr, self.sample.size, seen.routing)
        return timer.elapsed_s

    def _routing(self, point: Point) -> Routing:
        if point.routing is not None:
            return point.routing
        assert point.share is not None
        image = self.prepared.image
        light, heavy = image.uniform(0), image.uniform(-1)
        return BudgetRouting(image.cost, light + point.share * (heavy - light))

    def _chosen(self, classes_BHW: Tensor) -> Tensor:
        chosen = self.sr_M[0]
        for index, sr in enumerate(self.sr_M[1:], start=1):
            chosen = torch.where(classes_BHW[:, None] == index, sr, chosen)
        return chosen

    def _gains(self) -> Tensor:
        """(B, K, H, W): by how much less each upsampler errs than the lightest, squared."""
        hr = self.prepared.cut(to_tensor(self.sample.hr).to(self.lr.device))
        errors = []
        for sr in self.sr_M:
            error = sr.clamp(0, 1) - hr
            if self.conventions.psnr_type == "y":
                error = (error * error.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
            errors.append(error.square_().sum(dim=1))
        return torch.stack([errors[0] - error for error in errors[1:]], dim=1)


@dataclass(frozen=True)
class _Known:
    """Classes that are known already."""

    is_global: ClassVar[bool] = True
    known: Tensor

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        return self.known

    def describe(self) -> str:
        return "known"
