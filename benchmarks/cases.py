"""What is measured: networks, the ways to run them, and the picture they run on.

Axes: h w LR, H W output, M upsamplers.
"""

import argparse
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

import models
from datasets.resize import imresize
from engine.budget import Budget, BudgetPlan, OriginalCost
from engine.loading import load_original, load_pcsr
from engine.restore import PcsrRestorer, Restored
from models.backbones.base import SRNetwork
from models.budget import BudgetRouting
from models.cost import UpsamplingCost
from models.optimized import OptimizedOriginal
from models.pcsr import PCSR
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from utils.checkpoint import find_weights, load_checkpoint
from utils.config import Config, load_config
from utils.device import resolve_precision
from utils.errors import UserError
from utils.flops import executed_flops, paper_flops
from utils.images import read_rgb, to_tensor
from utils.machine import Timer

REPOSITORY = Path(__file__).resolve().parent.parent
PHOTOGRAPH = REPOSITORY / "examples" / "chelsea.png"
BACKBONES = ("fsrcnn", "carn", "srresnet", "rcan")
SCALE = 4

Variant = Literal["original", "original_optimized", "reference", "fast"]
VARIANTS: tuple[Variant, ...] = ("original", "original_optimized", "reference", "fast")
# These are what others are compared with; they are not touched by --precision.
FP32_VARIANTS = ("original", "reference")
SEED = 0

Size = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """Where a backbone's two networks come from; None stands for untrained weights.

    Attributes:
        backbone: registry name.
        pcsr, original: checkpoints.
    """

    backbone: str
    pcsr: Path | None
    original: Path | None

    @classmethod
    def find(
        cls, backbone: str, given: Sequence[Path], given_originals: Sequence[Path]
    ) -> "Source":
        """The checkpoint that was given for this backbone, else that in ``save/``, else None."""
        pcsr = _of_backbone(backbone, given) or _saved(_config(backbone, "pcsr-phase1").name)
        original = _of_backbone(backbone, given_originals) or _saved(_config(backbone, "x4").name)
        return cls(backbone, pcsr, original)

    def load_pcsr(self, device: torch.device) -> PCSR:
        """The PCSR model in eval mode."""
        if self.pcsr is not None:
            return load_pcsr(self.pcsr, device)
        model = _untrained(_config(self.backbone, "pcsr-phase1"))
        assert isinstance(model, PCSR)
        return model.to(device)

    def load_original(self, device: torch.device) -> SRNetwork:
        """The original network in eval mode."""
        if self.original is None:
            model = _untrained(_config(self.backbone, "x4"))
            assert isinstance(model, SRNetwork)
            return model.to(device)
        model = load_original(self.original, device)
        if model.scale != SCALE:
            raise UserError(f"checkpoint {self.original} is for x{model.scale}, not x{SCALE}")
        return model

    def describe(self) -> str:
        """On one line."""
        untrained = f"untrained weights (seed {SEED})"
        return (
            f"{self.backbone}: PCSR from {shown(self.pcsr) or untrained}; "
            f"original from {shown(self.original) or untrained}"
        )


def shown(path: Path | None) -> str | None:
    """A checkpoint for those who read results elsewhere: its place in the repository, or name."""
    if path is None:
        return None
    path = path.resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def _config(backbone: str, suffix: str) -> Config:
    return load_config(REPOSITORY / "configs" / f"{backbone}-{suffix}.yaml")


def _saved(name: str) -> Path | None:
    try:
        return find_weights(REPOSITORY / "save" / name)
    except UserError:
        return None


def _of_backbone(backbone: str, paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if backbone_of(path) == backbone), None)


def backbone_of(path: Path) -> str:
    """Registry name of the backbone, or of the original network, in a checkpoint."""
    spec = _spec_of(path)
    return str(spec["args"].get("encoder_spec", spec)["name"])


def is_pcsr(path: Path) -> bool:
    """Whether a checkpoint is of PCSR, not of an original network."""
    return "encoder_spec" in _spec_of(path)["args"]


@functools.cache
def _spec_of(path: Path) -> dict[str, Any]:
    spec = load_checkpoint(path)["model"]
    if "name" not in spec:
        raise UserError(f"checkpoint {path} does not say which model it holds")
    return {"name": spec["name"], "args": spec.get("args") or {}}


def _untrained(config: Config) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return models.make(config.model, data_norm=config.data_norm).eval()


@dataclass(frozen=True)
class ShareRouting:
    """A share of the pixels, those with the largest margins, to the heavy of two upsamplers."""

    is_global: ClassVar[bool] = True
    share: float

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See `models.routing.Routing`."""
        if len(log_costs_M) != 2:
            raise UserError(f"share: for 2 upsamplers, and this model has {len(log_costs_M)}")
        cost = UpsamplingCost(0.0, (0.0, 1.0), (0,), np.zeros((1, 2)))
        budget = round(self.share * margins_BKHW.numel())
        return BudgetRouting(cost, budget).classes(margins_BKHW, log_costs_M)

    def describe(self) -> str:
        """In words."""
        return f"{self.share:g} of the pixels heavy"


def make_routing(word: str, original: OriginalCost) -> Routing | BudgetPlan:
    """The routing that a word of ``--routing`` names.

    Args:
        original: what a budget may be a share of.

    Raises:
        ValueError: no such word.
    """
    if word in _ROUTINGS:
        return _ROUTINGS[word]
    name, _, amount = word.partition(":")
    if name == "budget":
        return BudgetPlan(Budget.parse(amount), original)
    if name == "share" and re.fullmatch(r"0?\.\d+|[01]", amount):
        return ShareRouting(float(amount))
    if re.fullmatch(r"k-?(\d+\.?\d*|\.\d+)", word):
        return KRouting(float(word[1:]))
    raise ValueError(
        f"expected k0, k1 (or any k), adm, heavy, light, budget:X or share:X, not `{word}`"
    )


_ROUTINGS: dict[str, Routing] = {
    "adm": AdaptiveRouting(),
    "heavy": FixedRouting(-1),
    "light": FixedRouting(0),
}


@dataclass(frozen=True)
class Case:
    """One way to run one network.

    Attributes:
        backbone: registry name.
        variant: the original as published or with the graph optimisations that PCSR's fast engine
            has, or PCSR on its reference or its fast engine.
        routing: a word of ``--routing``; None for originals.
        precision: "fp32", "bf16" or "fp16".
    """

    backbone: str
    variant: Variant
    routing: str | None
    precision: str

    def __str__(self) -> str:
        words = [self.backbone, self.variant, self.routing, self.precision]
        return " ".join(word for word in words if word)


def cases_of(
    backbone: str,
    variants: Sequence[Variant],
    routings: Sequence[str],
    precisions: Sequence[str],
) -> list[Case]:
    """All combinations that there are."""
    return [
        Case(backbone, variant, routing, precision)
        for variant in variants
        for precision in (["fp32"] if variant in FP32_VARIANTS else precisions)
        for routing in ([None] if variant.startswith("original") else routings)
    ]


class Networks:
    """A backbone's two networks on a device, each loaded when it is first needed."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device

    @functools.cached_property
    def pcsr(self) -> PCSR:
        """The PCSR model."""
        return self.source.load_pcsr(self.device)

    @functools.cached_property
    def original(self) -> SRNetwork:
        """The original network."""
        return self.source.load_original(self.device)

    def runner(self, case: Case) -> "OriginalRunner | PcsrRestorer":
        """What runs a case: takes LR (3, h, w) and (H, W), and times itself."""
        if case.routing is None:
            return OriginalRunner(self.original, case)
        return PcsrRestorer(
            self.pcsr,
            make_routing(case.routing, OriginalCost(case.backbone, self.original)),
            engine="reference" if case.variant == "reference" else "fast",
            precision=case.precision,
        )


class OriginalRunner:
    """An original network, as published or optimised."""

    def __init__(self, model: SRNetwork, case: Case) -> None:
        self.network: Callable[[Tensor], Tensor] = model
        if case.variant == "original_optimized":
            dtype = resolve_precision(case.precision, model.norm.mean.device)
            self.network = OptimizedOriginal(model, dtype)
        self._flops = functools.cache(
            lambda size: (paper_flops(model, (1, 3, *size)), executed_flops(model, (1, 3, *size)))
        )

    @torch.inference_mode()
    def __call__(self, lr: Tensor, size: Size) -> Restored:
        """`lr` (3, h, w) float RGB in [0, 1]; `size` is the network's scale times that."""
        with Timer(lr.device) as timer:
            sr = self.network(lr[None])
        flops = self._flops((lr.shape[-2], lr.shape[-1]))
        return Restored(sr[0], None, [], *flops, timer.elapsed_s)


def lr_size(text: str) -> Size:
    """`type=` of an option that takes WIDTHxHEIGHT; (h, w)."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 420x276, not `{text}`")
    return int(match[2]), int(match[1])


def encoder_time_s(restorer: PcsrRestorer, lr: Tensor) -> float:
    """Time of a PCSR model's encoder alone on `lr` (3, h, w)."""
    with torch.inference_mode(), Timer(lr.device) as timer:
        for _ in restorer.engine.encode_rows(lr[None]):
            pass
    return timer.elapsed_s


def picture(lr_size: Size) -> Tensor:
    """The bundled photograph as an LR image (3, h, w), float RGB in [0, 1].

    It is resized by MATLAB's bicubic to the size, or to the half, a quarter, ... of it that is no
    larger than the photograph, and then mirrored on. So a size and its double show the same
    content, and the same share of it is hard.
    """
    photograph = to_tensor(read_rgb(PHOTOGRAPH))
    rows, cols = lr_size
    tiles = 1
    while rows > tiles * photograph.shape[-2] or cols > tiles * photograph.shape[-1]:
        tiles *= 2
    tile = imresize(photograph, size=(-(-rows // tiles), -(-cols // tiles))).clamp(0, 1)
    for axis in (1, 2):
        pair = torch.cat([tile, tile.flip(axis)], dim=axis)
        tile = torch.cat([pair] * -(-tiles // 2), dim=axis)
    return tile[:, :rows, :cols].contiguous()
