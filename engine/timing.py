"""What an image will take on this device, from a short measurement on a part of it.

Axes: h w LR, H W output, M upsamplers.
"""

import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.budget import BudgetRouting
from models.cost import ImageCost, UpsamplingCost, count_rows
from models.routing import FixedRouting, Routing
from utils.machine import Timer, synchronize

if TYPE_CHECKING:
    from engine.restore import PcsrRestorer

logger = logging.getLogger(__name__)

# The part that is measured: at least so many LR pixels (as an encoder's run of rows has), and more
# until a run takes so long.
_LEAST_PX = 16384
_LEAST_S = 0.03
# It is measured twice, as the first time is slower, and again up to so often until so much time has
# passed.
_LEAST_ROUNDS = 2
_ROUNDS = 4
_ENOUGH_S = 0.4

# Beyond this share of the budget a delay is worth a warning.
_LATE = 0.1


@dataclass(frozen=True)
class ImageTimes:
    """What an image takes, in seconds.

    Attributes:
        routing_s: the routing.
        after: what follows it, by class.
        least_s, most_s: all of it, encoder and classifier included, all-light and all-heavy.
    """

    routing_s: float
    after: UpsamplingCost
    least_s: float
    most_s: float


class TimedRouting:
    """As many heavy pixels as the time allows that is left when they are chosen.

    What the encoder took is not predicted but seen: the clock runs from the construction on. An
    image that is late by then is all-light, with a warning.

    Args:
        times: of the image.
        budget_s: for all of it.
        words: for :meth:`describe`.
    """

    is_global: ClassVar[bool] = True

    def __init__(self, times: ImageTimes, budget_s: float, words: str) -> None:
        self.times = times
        self.budget_s = budget_s
        self.words = words
        self._end_s = time.perf_counter() + budget_s

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See `models.routing.Routing`; all patches of the image at once."""
        synchronize(margins_BKHW.device)
        left_s = self._end_s - time.perf_counter() - self.times.routing_s
        patches, _, height, width = margins_BKHW.shape
        late_s = self.times.after.uniform(0, (height, width), patches) - left_s
        if late_s > _LATE * self.budget_s:
            logger.warning("%s: will be late by about %.3g ms", self.words, 1e3 * late_s)
        return BudgetRouting(self.times.after, left_s).classes(margins_BKHW, log_costs_M)

    def describe(self) -> str:
        """The budget in words."""
        return self.words


class _Probe:
    """Another routing, and when it was reached and left."""

    is_global: ClassVar[bool] = True

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        synchronize(margins_BKHW.device)
        self.reached_s = time.perf_counter()
        self.chosen = self.routing.classes(margins_BKHW, log_costs_M)
        synchronize(margins_BKHW.device)
        self.left_s = time.perf_counter()
        return self.chosen

    def describe(self) -> str:
        return self.routing.describe()


@dataclass(frozen=True)
class _Sample:
    """Seconds before, in and after the routing of one run."""

    before_s: float
    routing_s: float
    after_s: float

    @classmethod
    def typical(cls, samples: Sequence["_Sample"]) -> "_Sample":
        """Of few: the lower median, as what disturbs a measurement makes it longer."""
        return cls(
            statistics.median_low([sample.before_s for sample in samples]),
            statistics.median_low([sample.routing_s for sample in samples]),
            statistics.median_low([sample.after_s for sample in samples]),
        )


@dataclass(frozen=True)
class PixelTimes:
    """What output pixels take from their routing on.

    Engines differ: where the lightest upsampler runs on whole strips (`UpsamplingCost.pixel` is 0
    for it), each of the strip's pixels takes its time, whatever their classes are.

    Attributes:
        pixel_s: (M,) a pixel by its class, where its strip is of one class.
        extra_s: for each pixel of a strip and each upsampler there that others share it with.
    """

    pixel_s: tuple[float, ...]
    extra_s: float

    @classmethod
    def fit(
        cls,
        image: ImageCost,
        pure_s: Sequence[float],
        mixed_s: float,
        mixed_counts_BHM: NDArray[np.int64],
    ) -> "PixelTimes":
        """From the times of an image with each class everywhere, and with a mixture.

        Args:
            image: for its strips.
            mixed_counts_BHM: the mixture, see `models.cost`.
        """
        # A heavier upsampler may seem faster, by chance.
        pixel_s = [longest / image.pixels for longest in itertools.accumulate(pure_s, max)]
        # Linear in what is sought: the cost without it, and what it is multiplied with.
        alone_s = cls(tuple(pixel_s), 0.0).cost(image).total(mixed_counts_BHM)
        shared_px = cls((0.0,) * len(pixel_s), 1.0).cost(image).total(mixed_counts_BHM)
        extra_s = max(0.0, mixed_s - alone_s) / shared_px if shared_px > 0 else 0.0
        return cls(tuple(pixel_s), extra_s)

    def cost(self, image: ImageCost, fixed_s: float = 0.0) -> UpsamplingCost:
        """An image's time as a function of its classes, `fixed_s` for each patch included."""
        per_strip = np.full(len(self.pixel_s), self.extra_s)
        if image.cost.pixel[0] == 0:
            per_strip[0] = self.pixel_s[0]
        return UpsamplingCost(
            fixed=fixed_s,
            pixel=tuple(np.subtract(self.pixel_s, per_strip).tolist()),
            strip_starts=image.cost.strip_starts,
            strip=_strip_pixels(image)[:, None] * per_strip,
        )


def measure_times(restorer: "PcsrRestorer", lr: Tensor, size: tuple[int, int]) -> ImageTimes:
    """Measure on a horizontal band of an image what the whole of it will take.

    The band is run with each upsampler everywhere and with a mixture, two to four times each.

    Args:
        restorer: what will run the image.
        lr: (3, h, w).
        size: (H, W) of the output.
    """
    image = restorer.image_cost((lr.shape[-2], lr.shape[-1]), size)
    band, band_size = _band(restorer, lr, size)
    part = restorer.image_cost((band.shape[-2], band.shape[-1]), band_size)
    upsamplers = len(part.cost.pixel)
    probes = [_Probe(FixedRouting(index)) for index in range(upsamplers)]
    half_way = (part.uniform(0) + part.uniform(-1)) / 2
    probes.append(_Probe(BudgetRouting(part.cost, half_way)))
    rounds: list[list[_Sample]] = []
    end_s = time.perf_counter() + _ENOUGH_S
    while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _ROUNDS and time.perf_counter() < end_s):
        rounds.append([_run(restorer, band, band_size, probe) for probe in probes])
    *pure, mixed = (_Sample.typical(samples) for samples in zip(*rounds, strict=True))
    counts = count_rows(probes[-1].chosen, upsamplers)
    pixel_times = PixelTimes.fit(part, [each.after_s for each in pure], mixed.after_s, counts)
    factor = image.pixels / part.pixels
    before_s = factor * statistics.median_low([s.before_s for row in rounds for s in row])
    routing_s = factor * mixed.routing_s
    again_s = 0.0
    if restorer.encoder_passes((lr.shape[-2], lr.shape[-1])) > 1:
        again_s = factor * _encode_s(restorer, band)
    after = pixel_times.cost(image, again_s)
    least_s, most_s = (
        before_s + routing_s + after.uniform(index, image.size, image.patches) for index in (0, -1)
    )
    return ImageTimes(routing_s, after, least_s, most_s)


def _band(
    restorer: "PcsrRestorer", lr: Tensor, size: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """The middle rows of `lr`, large enough to be measured, and their output's size."""
    h, w = lr.shape[-2:]
    probe = _Probe(FixedRouting(0))
    rows = -(-_LEAST_PX // w)
    while True:
        rows = min(restorer.tiled_rows(rows), h)
        top = (h - rows) // 2
        band = lr[:, top : top + rows]
        band_size = (max(1, round(rows * size[0] / h)), size[1])
        sample = _run(restorer, band, band_size, probe)
        if rows == h or sample.before_s + sample.after_s >= _LEAST_S:
            return band, band_size
        rows *= 4


def _run(restorer: "PcsrRestorer", lr: Tensor, size: tuple[int, int], probe: _Probe) -> _Sample:
    synchronize(lr.device)
    start_s = time.perf_counter()
    restorer.run(lr, size, probe)
    synchronize(lr.device)
    return _Sample(
        before_s=probe.reached_s - start_s,
        routing_s=probe.left_s - probe.reached_s,
        after_s=time.perf_counter() - probe.left_s,
    )


def _encode_s(restorer: "PcsrRestorer", lr: Tensor) -> float:
    with Timer(lr.device) as timer:
        for _ in restorer.engine.encode_rows(lr[None]):
            pass
    return timer.elapsed_s


def _strip_pixels(image: ImageCost) -> NDArray[np.int64]:
    """(S,) output pixels of each strip."""
    return np.diff([*image.cost.strip_starts, image.size[0]]) * image.size[1]
