"""Budgets as users give them: a share of the original's FLOPs, FLOPs, or time, per image.

Axes: h w LR, H W output.
"""

import logging
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

import models
from engine.timing import ImageTimes, TimedRouting, measure_times
from models.backbones.base import SCALES, SRNetwork
from models.budget import BudgetRouting
from models.routing import Routing
from utils.config import Config
from utils.errors import UserError
from utils.flops import executed_flops, nominal_scale

if TYPE_CHECKING:
    from engine.restore import PcsrRestorer

logger = logging.getLogger(__name__)

Unit = Literal["share", "flops", "seconds"]
Size = tuple[int, int]

_SUFFIXES: dict[str, tuple[Unit, float]] = {
    "": ("share", 1),
    "M": ("flops", 1e6),
    "G": ("flops", 1e9),
    "T": ("flops", 1e12),
    "ms": ("seconds", 1e-3),
    "s": ("seconds", 1),
}

# How amounts are written.
_TYPED: dict[Unit, tuple[str, float]] = {
    "share": ("", 1.0),
    "flops": ("G", 1e9),
    "seconds": ("ms", 1e-3),
}

# The published original network of each backbone, and its argument for the scale.
_ORIGINALS: dict[str, tuple[dict[str, int], str]] = {
    "carn": ({"nf": 64}, "scale"),
    "fsrcnn": ({"d": 56, "s": 12, "m": 4}, "upscale"),
    "srresnet": ({"nf": 64, "nb": 16}, "upscale"),
    "rcan": ({"nf": 64, "ng": 10, "nb": 20, "reduction": 16}, "scale"),
}


@dataclass(frozen=True)
class Budget:
    """What an image may cost.

    Attributes:
        amount: of the original's executed FLOPs, in executed FLOPs, or in seconds.
        unit: which of these.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`0.6`, `500M`, `60G`, `250ms` or `0.25s`; ValueError for anything else."""
        match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(M|G|T|ms|s|)", text.strip(), re.ASCII)
        if match is None or not 0 < float(match[1]) < math.inf:
            raise ValueError(
                f"expected a share such as 0.6, FLOPs such as 60G or 500M, or a time such as "
                f"250ms, not `{text}`"
            )
        unit, factor = _SUFFIXES[match[2]]
        return cls(float(match[1]) * factor, unit)

    def describe(self) -> str:
        """In words, for logs and tables."""
        if self.unit == "share":
            return f"budget {self.amount:g} of the original's executed FLOPs"
        if self.unit == "flops":
            return f"budget {self.amount / 1e9:g} GFLOPs executed per image"
        return f"budget {self.amount * 1e3:g} ms per image"

    def exactly(self) -> str:
        """This amount as one would type it."""
        suffix, factor = _TYPED[self.unit]
        return f"{_without_exponent(self.amount / factor, 12)}{suffix}"

    def format(self, amount: float) -> str:
        """Another amount as one would type it, rounded up to four digits."""
        suffix, factor = _TYPED[self.unit]
        value = amount / factor
        digit = 10.0 ** (math.floor(math.log10(value)) - 3)
        return f"{_without_exponent(math.ceil(value / digit) * digit, 4)}{suffix}"


def _without_exponent(value: float, digits: int) -> str:
    """A number to so many significant digits, as :meth:`Budget.parse` takes it."""
    return f"{Decimal(f'{value:.{digits}g}'):f}"


class OriginalCost:
    """Executed FLOPs of the original network that shares refer to.

    Args:
        backbone: registry name; its published original is taken, at the scale that is asked for.
        model: the original itself, instead.
    """

    def __init__(self, backbone: str, model: SRNetwork | None = None) -> None:
        self._backbone = backbone
        self._given = model
        self._published: dict[int, nn.Module] = {}
        self._flops: dict[tuple[int, int, int], int] = {}

    @classmethod
    def of_config(cls, backbone: str, config: Config) -> "OriginalCost":
        """The original network of a config; UserError where it is of none."""
        model = models.make(config.model)
        if not isinstance(model, SRNetwork) or model.no_upsampling:
            raise UserError(f"config {config.name} is not of an original network")
        return cls(backbone, model)

    def executed(self, lr_size: Size, size: Size) -> int:
        """FLOPs from an image of (h, w), or one of its patches, to (H, W)."""
        wanted = nominal_scale(lr_size, size)
        # Half-way between two scales the larger: its output has what a resize then takes away.
        scale = min(SCALES, key=lambda scale: (abs(scale - wanted), -scale))
        key = (scale, *lr_size)
        if key not in self._flops:
            model = self._given or self._model(scale, wanted)
            self._flops[key] = executed_flops(model, (1, 3, *lr_size))
        return self._flops[key]

    def _model(self, scale: int, wanted: float) -> nn.Module:
        if self._backbone not in _ORIGINALS:
            raise UserError(
                f"--budget: no published original is known of `{self._backbone}`: "
                f"name its config with --original_config"
            )
        if scale not in self._published:
            if scale != wanted:
                logger.info(
                    "no original network exists at x%g: the budget is a share of %s at x%d",
                    wanted,
                    self._backbone,
                    scale,
                )
            args, scale_word = _ORIGINALS[self._backbone]
            spec = {"name": self._backbone, "args": {**args, scale_word: scale}}
            self._published[scale] = models.make(spec)
        return self._published[scale]


class BudgetPlan:
    """Makes the routing that keeps each image within a budget.

    Args:
        budget: per image.
        original: what a share refers to.
    """

    def __init__(self, budget: Budget, original: OriginalCost) -> None:
        self.budget = budget
        self.original = original
        self._times: dict[tuple[Size, Size], ImageTimes] = {}
        self._has_warned = False

    def describe(self) -> str:
        """The budget in words."""
        return self.budget.describe()

    def routing_for(self, restorer: "PcsrRestorer", lr: Tensor, size: Size) -> Routing:
        """The routing of one image; where time is the budget, it starts to run now.

        Args:
            restorer: what will run it.
            lr: (3, h, w).
            size: (H, W) of the output.

        Raises:
            UserError: the budget is less than the lightest upsampler costs everywhere (or the
                heaviest, where it is that which executes less).
        """
        if self.budget.unit == "seconds":
            times = self._times_for(restorer, lr, size)
            self._check(times.least_s, times.most_s, 1.0)
            return TimedRouting(times, self.budget.amount, self.describe())
        lr_size = (lr.shape[-2], lr.shape[-1])
        image = restorer.image_cost(lr_size, size)
        one = 1.0
        if self.budget.unit == "share":
            part = self.original.executed(image.lr_size, image.size)
            one = float(image.patches * part)
        self._check(image.uniform(0), image.uniform(-1), one)
        return BudgetRouting(image.cost, self.budget.amount * one, self.describe())

    def _times_for(self, restorer: "PcsrRestorer", lr: Tensor, size: Size) -> ImageTimes:
        key = ((lr.shape[-2], lr.shape[-1]), size)
        if key not in self._times:
            self._times[key] = measure_times(restorer, lr, size)
        return self._times[key]

    def _check(self, least: float, most: float, one: float) -> None:
        """Compare with what all-light and all-heavy cost; `one` is the cost of an amount of 1."""
        amount, about = self.budget.amount * one, "about " * (self.budget.unit == "seconds")
        cheapest, name = min((least, "lightest"), (most, "heaviest"))
        if amount < cheapest:
            raise UserError(
                f"--budget: {self.budget.exactly()} is too little; with the "
                f"{name} upsampler everywhere this image takes {about}"
                f"{self.budget.format(cheapest / one)}"
            )
        if amount > most and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "--budget: %s is more than the heaviest upsampler needs everywhere (%s%s here%s)",
                self.budget.format(self.budget.amount),
                about,
                self.budget.format(most / one),
                ", less than the lightest" if most < least else "",
            )
