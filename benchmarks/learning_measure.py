"""PSNR at equal shares of heavy pixels, by the classifier's order and by others.

Axes: M = 2 upsamplers, H W output; B = K = 1 in all names.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine.conventions import Conventions
from engine.prepared import PreparedImage
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.samples import EvaluationSample, EvaluationSet
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from models.refinement import refine
from models.routing import AdaptiveRouting, KRouting
from utils.images import to_tensor
from utils.metrics import psnr

SHARES = (0.1, 0.25, 0.5)
CLASSIFIER, ORACLE, DISTANCE = "classifier", "oracle", "distance of light and heavy"


class MeasuredImage:
    """An image with both upsamplers' outputs everywhere.

    Attributes:
        margins_BKHW: of the classifier.
        gains_BKHW: the fall of the squared error.
        distances_BKHW: the squared distance of both outputs.
    """

    def __init__(
        self, restorer: PcsrRestorer, sample: EvaluationSample, conventions: Conventions
    ) -> None:
        self.sample = sample
        self.lr = sample.lr.to(restorer.model.norm.std.device)
        self._conventions = conventions
        self._log_costs = restorer.cost.log_costs((self.lr.shape[1], self.lr.shape[2]), sample.size)
        prepared = PreparedImage(restorer, self.lr, sample.size)
        self.margins_BKHW = prepared.margins_BKHW.float()
        shape = (1, *sample.size)
        self._light, self._heavy = (
            prepared.upsample(torch.full(shape, j, dtype=torch.uint8, device=self.lr.device))[0]
            for j in (0, 1)
        )
        light, heavy = self._light.clamp(0, 1), self._heavy.clamp(0, 1)
        hr = to_tensor(sample.hr).to(self.lr.device)
        errors = [(y - hr).square().sum(dim=1, keepdim=True) for y in (light, heavy)]
        self.gains_BKHW = errors[0] - errors[1]
        self.distances_BKHW = (light - heavy).square().sum(dim=1, keepdim=True)

    def by_order(self, order_BKHW: Tensor, shares: Sequence[float]) -> list[float]:
        """PSNR where these shares of the pixels, the first by `order_BKHW`, are heavy."""
        ranked = order_BKHW.flatten().argsort(descending=True, stable=True)
        figures = []
        for share in shares:
            classes = torch.zeros_like(ranked, dtype=torch.uint8)
            classes[ranked[: round(share * len(ranked))]] = 1
            figures.append(self._psnr(classes.view(1, *self.sample.size)))
        return figures

    def by_routing(self, routing: KRouting | AdaptiveRouting) -> tuple[float, float]:
        """Share of heavy pixels, and PSNR."""
        classes = routing.classes(self.margins_BKHW, self._log_costs)
        return float(classes.float().mean()), self._psnr(classes)

    def _psnr(self, classes_BHW: Tensor) -> float:
        chosen = torch.where(classes_BHW[:, None] == 1, self._heavy, self._light)
        return psnr(
            refine(chosen, classes_BHW)[0],
            self.sample.hr,
            psnr_type=self._conventions.psnr_type,
            border_px=self._conventions.border_px,
        )


def _gradient(image: MeasuredImage) -> Tensor:
    """Sum of the absolute differences of the enlarged LR's grey values, across and down."""
    grey = image.lr.mean(dim=0)[None, None]
    large = F.interpolate(grey, size=image.sample.size, mode="bilinear")
    padded = F.pad(large, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    return across.abs() + down.abs()


def _random(image: MeasuredImage) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(image.margins_BKHW.shape, generator=generator).to(image.lr.device)


def _smoothed_gain(image: MeasuredImage) -> Tensor:
    return F.avg_pool2d(F.pad(image.gains_BKHW, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


# In which order pixels become heavy. The last three know what no classifier knows.
ORDERS: dict[str, Callable[[MeasuredImage], Tensor]] = {
    "random": _random,
    "gradient of LR": _gradient,
    CLASSIFIER: lambda image: image.margins_BKHW,
    DISTANCE: lambda image: image.distances_BKHW,
    "gain over 5x5 pixels": _smoothed_gain,
    ORACLE: lambda image: image.gains_BKHW,
}


@dataclass(frozen=True)
class Figures:
    """Means over the images of a set.

    Attributes:
        light, heavy: PSNR of one upsampler everywhere, in dB.
        orders: PSNR at each of SHARES, by order.
        k0, adm: share of heavy pixels, and PSNR.
    """

    light: float
    heavy: float
    orders: dict[str, list[float]]
    k0: tuple[float, float]
    adm: tuple[float, float]

    @classmethod
    def mean(cls, figures: Sequence["Figures"]) -> "Figures":
        """The mean of every figure."""

        def mean(pick: Callable[[Figures], Sequence[float]]) -> list[float]:
            return [statistics.fmean(values) for values in zip(*map(pick, figures), strict=True)]

        light, heavy = mean(lambda f: (f.light, f.heavy))
        orders = {
            name: [
                statistics.fmean(p) for p in zip(*(f.orders[name] for f in figures), strict=True)
            ]
            for name in figures[0].orders
        }
        k0, adm = mean(lambda f: f.k0), mean(lambda f: f.adm)
        return cls(light, heavy, orders, (k0[0], k0[1]), (adm[0], adm[1]))

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what can be repeated."""
        plain = {"light": self.light, "heavy": self.heavy, "orders": self.orders}
        return _rounded({**plain, "k0": self.k0, "adm": self.adm})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else [_rounded(each) for each in value]


@torch.inference_mode()
def measure(model: PCSR, images: EvaluationSet, names: Sequence[str]) -> Figures:
    """Figures of a model with two upsamplers on a set of images.

    Args:
        names: which of ORDERS.
    """
    restorer = PcsrRestorer(model)
    figures = []
    for index in tqdm(range(len(images)), desc="measuring", leave=False, disable=None):
        image = MeasuredImage(restorer, images[index], images.conventions)
        orders = {name: ORDERS[name](image) for name in names}
        light, heavy = image.by_order(image.margins_BKHW, (0, 1))
        figures.append(
            Figures(
                light=light,
                heavy=heavy,
                orders={name: image.by_order(order, SHARES) for name, order in orders.items()},
                k0=image.by_routing(KRouting(0.0)),
                adm=image.by_routing(AdaptiveRouting()),
            )
        )
    return Figures.mean(figures)


@torch.inference_mode()
def measure_all_heavy(model: nn.Module, images: EvaluationSet) -> float:
    """Mean PSNR of PCSR with one upsampler, or of an original network, in dB."""
    device = next(model.parameters()).device
    conventions = images.conventions
    figures = []
    for index in range(len(images)):
        sample = images[index]
        lr = sample.lr.to(device)
        if isinstance(model, PCSR):
            sr = PcsrRestorer(model)(lr, sample.size).sr
        else:
            assert isinstance(model, SRNetwork)
            sr = OriginalRestorer(model)(lr).sr
        figures.append(
            psnr(sr, sample.hr, psnr_type=conventions.psnr_type, border_px=conventions.border_px)
        )
    return statistics.fmean(figures)
