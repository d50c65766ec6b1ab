"""How far a budget reaches, where pixels are raised to heavier upsamplers in a given order.

Axes: B patches of *one* image (or the image), M upsamplers, K = M - 1, H W output.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.cost import UpsamplingCost, count_rows_above, row_chunks

# So many raises in question are gathered, instead of counting over the image again and again; up
# to the smaller number guesses are not worth it.
_GATHERED = 2**16
_GATHERED_AT_ONCE = 2**13

_GUESSES = 10

# Guesses are by a sample of so many pixels as long as enough of it lies between two thresholds.
_SAMPLE = 2**14
_ENOUGH = 2**9
# How far beside the most probable place a guess is, in parts of the way between the thresholds:
# by a sample of n over the square root of n (four standard deviations), by interpolation.
_DOUBT_OF_SAMPLE = 2.0
_DOUBT_OF_INTERPOLATION = 0.05

# Keys of +-infinity, see _float_of.
_INFINITY = 0x7F800000
_MINUS_INFINITY = -_INFINITY - 1


class Raising:
    """An image whose pixels are raised in order; finds how far a budget reaches.

    The search is exact, and its memory little more than the class map's: a threshold is tried by
    counting, and only the last few pixels in question are gathered.

    Args:
        kappa_BKHW: (B, K, H, W) float32, see `models.budget.raise_order`.
        cost: of the image.
    """

    def __init__(self, kappa_BKHW: Tensor, cost: UpsamplingCost) -> None:
        self.kappa_BKHW = kappa_BKHW
        self.cost = cost
        self.rest: _Rest | None = None

    def up_to(self, budget: float) -> Tensor:
        """Classes (B, H, W) uint8."""
        patches, K, H, W = self.kappa_BKHW.shape
        if self.cost.uniform(-1, (H, W), patches) <= budget:
            return self.kappa_BKHW.new_full((patches, H, W), K, dtype=torch.uint8)
        fits, exceeds = self._trial(_INFINITY), self._trial(_MINUS_INFINITY)
        if fits.cost > budget or exceeds.cost <= budget:
            reached = fits if fits.cost > budget else exceeds
            return self._classes(torch.tensor(reached.threshold))
        fits, exceeds = self._narrow(fits, exceeds, budget)
        if _raised(fits, exceeds) <= 1:
            return self._classes(torch.tensor(fits.threshold))
        # Pixels between the two thresholds are equal: those that come first are raised.
        rows = _last(
            patches * H, lambda n: self.cost.total(_mixed(exceeds.counts, fits.counts, n)) <= budget
        )
        thresholds = torch.full((patches * H,), fits.threshold)
        thresholds[:rows] = exceeds.threshold
        classes = self._classes(thresholds.view(patches, H, 1))
        self._raise_in_row(classes, rows, fits, exceeds, budget)
        return classes

    def _narrow(
        self, fits: "_Trial", exceeds: "_Trial", budget: float
    ) -> tuple["_Trial", "_Trial"]:
        """Raise one threshold and lower the other until the pixels between are equal, or one."""
        guesses = _Guesses(self.kappa_BKHW, self.cost, budget)
        while exceeds.key + 1 < fits.key and (between := _raised(fits, exceeds)) > 1:
            if self.rest is None and (
                between <= _GATHERED_AT_ONCE or (between <= _GATHERED and not guesses.left)
            ):
                self.rest = _Rest.gather(self.kappa_BKHW, fits, exceeds)
            if self.rest is not None:
                key = self.rest.median_key()
            elif guesses.left:
                key = guesses.next_key(fits, exceeds)
            else:
                key = (exceeds.key + fits.key) // 2
            trial = self._trial(min(max(key, exceeds.key + 1), fits.key - 1))
            if trial.cost <= budget:
                fits = trial
            else:
                exceeds = trial
            if self.rest is not None:
                self.rest = self.rest.between(fits, exceeds)
        return fits, exceeds

    def _trial(self, key: int) -> "_Trial":
        threshold = _float_of(key)
        if self.rest is not None:
            counts_BHM = self.rest.counts(threshold)
        else:
            counts_BHM = count_rows_above(self.kappa_BKHW, [threshold] * self.kappa_BKHW.shape[1])
        return _Trial(key, threshold, counts_BHM, self.cost.total(counts_BHM))

    def _classes(self, thresholds: Tensor) -> Tensor:
        thresholds = thresholds.to(self.kappa_BKHW.device)
        classes, *others = (
            (kappa_BHW > thresholds).view(torch.uint8) for kappa_BHW in self.kappa_BKHW.unbind(1)
        )
        for other in others:
            classes.add_(other)
        return classes

    def _raise_in_row(
        self, classes: Tensor, row: int, fits: "_Trial", exceeds: "_Trial", budget: float
    ) -> None:
        """Raise the first pixels of `row` (counted over all patches) as far as `budget` goes."""
        _, K, H, W = self.kappa_BKHW.shape
        patch, y = divmod(row, H)
        kappa_KW = self.kappa_BKHW[patch, :, y]
        low = (kappa_KW > fits.threshold).sum(0).cpu().numpy()
        high = (kappa_KW > exceeds.threshold).sum(0).cpu().numpy()
        counts_BHM = _mixed(exceeds.counts, fits.counts, row)

        def within(pixels: int) -> bool:
            mixed = np.concatenate([high[:pixels], low[pixels:]])
            counts_BHM[patch, y] = np.bincount(mixed, minlength=K + 1)
            return self.cost.total(counts_BHM) <= budget

        pixels = _last(W, within)
        classes[patch, y, :pixels] = torch.from_numpy(high[:pixels]).to(classes)


@dataclass(frozen=True)
class _Trial:
    """What raising all pixels above a threshold would cost."""

    key: int
    threshold: float
    counts: NDArray[np.int64]
    cost: float


class _Guesses:
    """Thresholds at which the budget is probably used up, or nearly.

    Args:
        kappa_BKHW, cost: of the image.
    """

    def __init__(self, kappa_BKHW: Tensor, cost: UpsamplingCost, budget: float) -> None:
        values = kappa_BKHW.flatten()
        sample = values[:: 1 + len(values) // _SAMPLE].cpu().numpy()
        self._sample = np.sort(sample[np.isfinite(sample)])
        self._budget = budget
        # What is to be done once in a strip for the first heavy pixel, and for the last light one:
        # nearly all of the way it is to be done for both.
        self._first, self._last = cost.strip[:, -1].sum(), cost.strip[:, 0].sum()
        self.left = _GUESSES

    def next_key(self, fits: "_Trial", exceeds: "_Trial") -> int:
        """A key between, on either side of the most probable place in turn."""
        self.left -= 1
        low = fits.cost + (self._first if fits.key == _INFINITY else 0)
        high = exceeds.cost + (self._last if exceeds.key == _MINUS_INFINITY else 0)
        share = (self._budget - low) / (high - low) if high > low else 0.5
        side = 1 if self.left % 2 else -1
        between = (exceeds.threshold, fits.threshold)
        first, last = np.searchsorted(self._sample, between, side="right")
        if last - first >= _ENOUGH:
            share += side * _DOUBT_OF_SAMPLE / math.sqrt(last - first)
            place = last - 1 - round(share * (last - first))
            return _key_of(float(self._sample[min(max(place, first), last - 1)]))
        if not (math.isfinite(between[0]) and math.isfinite(between[1])):
            return (exceeds.key + fits.key) // 2
        share = min(max(share + side * _DOUBT_OF_INTERPOLATION, 0), 1)
        return _key_of(fits.threshold + share * (exceeds.threshold - fits.threshold))


@dataclass(frozen=True)
class _Rest:
    """What is raised between two thresholds.

    Attributes:
        counts_BHM: at the upper threshold, where none of it is raised yet.
        kappa, row, raised_to: of each raise, the row counted over all patches.
    """

    counts_BHM: NDArray[np.int64]
    kappa: NDArray[np.float32]
    row: NDArray[np.int64]
    raised_to: NDArray[np.int64]

    @classmethod
    def gather(cls, kappa_BKHW: Tensor, fits: _Trial, exceeds: _Trial) -> "_Rest":
        """Of an image's (B, K, H, W) float32: what `exceeds` raises and `fits` does not."""
        values, places = [], []
        H = kappa_BKHW.shape[2]
        for rows in row_chunks(kappa_BKHW):
            chunk = kappa_BKHW[:, :, rows]
            between = (chunk > exceeds.threshold).logical_and_(chunk <= fits.threshold)
            b, k, y, x = between.nonzero(as_tuple=True)
            values.append(chunk[b, k, y, x])
            places.append(torch.stack([b * H + y + rows.start, k + 1]))
        row, raised_to = torch.cat(places, dim=1).cpu().numpy()
        return cls(fits.counts, torch.cat(values).cpu().numpy(), row, raised_to)

    def between(self, fits: _Trial, exceeds: _Trial) -> "_Rest":
        """What is raised between two closer thresholds."""
        kept = (self.kappa > exceeds.threshold) & (self.kappa <= fits.threshold)
        return _Rest(fits.counts, self.kappa[kept], self.row[kept], self.raised_to[kept])

    def median_key(self) -> int:
        """Key of a threshold that half of it exceeds."""
        middle = len(self.kappa) // 2
        return _key_of(float(np.partition(self.kappa, middle)[middle]))

    def counts(self, threshold: float) -> NDArray[np.int64]:
        above = self.kappa > threshold
        cell = self.row[above] * self.counts_BHM.shape[-1] + self.raised_to[above]
        size = self.counts_BHM.size
        change = np.bincount(cell, minlength=size) - np.bincount(cell - 1, minlength=size)
        return self.counts_BHM + change.reshape(self.counts_BHM.shape)


def _raised(fits: _Trial, exceeds: _Trial) -> int:
    """By how many classes, over all pixels, two trials differ."""
    return _raised_of(exceeds) - _raised_of(fits)


def _raised_of(trial: _Trial) -> int:
    """The sum of all pixels' classes."""
    counts_M = trial.counts.sum(axis=(0, 1))
    return int(counts_M @ np.arange(len(counts_M)))


def _mixed(
    first_BHM: NDArray[np.int64], rest_BHM: NDArray[np.int64], rows: int
) -> NDArray[np.int64]:
    """The first `rows` rows of one, over all patches, and the others of the other."""
    mixed = rest_BHM.copy()
    flat_RM = mixed.reshape(-1, mixed.shape[-1])
    flat_RM[:rows] = first_BHM.reshape(flat_RM.shape)[:rows]
    return mixed


def _last(stop: int, within: Callable[[int], bool]) -> int:
    """The n in 0..stop-1 with `within(n)` but not `within(n + 1)`.

    Taken for granted: `within(0)`, and not `within(stop)`.
    """
    inside, outside = 0, stop
    while inside + 1 < outside:
        middle = (inside + outside) // 2
        if within(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _float_of(key: int) -> float:
    """The float32 with this rank among all: integers in the order of the numbers they stand for."""
    bits = np.array(key if key >= 0 else key ^ 0x7FFFFFFF, np.int32)
    return float(bits.view(np.float32))


def _key_of(value: float) -> int:
    """The inverse of :func:`_float_of`."""
    bits = int(np.array(value, np.float32).view(np.int32))
    return bits if bits >= 0 else -1 - (bits & 0x7FFFFFFF)
