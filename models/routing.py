"""Routing policies: one upsampler per output pixel from the classifier's logits.

Probabilities p_j are the softmax of the logits over the M upsamplers, ordered light to heavy; c_j
are the upsamplers' relative costs (:meth:`utils.flops.PcsrCost.log_costs`). Ties go to the lighter.

Axes: B patches (or tiles) of *one* image, M upsamplers, H W output.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from models.native import library
from models.native.passes import histogram as histogram_of
from utils.errors import UserError

# Beyond this k every logit is negligible; larger values would overflow float32.
MAX_K = 1e30

# The published clustering: fast_pytorch_kmeans with max_iter 20 and tol 1e-4. Its first iteration
# has a single centroid and only yields the start centroids, so 19 are left.
LLOYD_STEPS = 19
LLOYD_TOLERANCE = 1e-4
_SCORE_BINS = 2**16
_CHUNK_PIXELS = 2**20
# Elsewhere than on a CPU: what a chunk starts costs as much as a million pixels.
_DEVICE_CHUNK_PIXELS = 2**24
# Of an image of 2560x1600; 16 MB.
KEPT_SCORES = 2**22


class Routing(Protocol):
    """A policy that gives every output pixel one upsampler.

    Attributes:
        is_global: True where a pixel's class depends on the other pixels, so that an image's
            patches must be routed together.
    """

    is_global: ClassVar[bool]

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """Index of each pixel's upsampler.

        Args:
            margins_BKHW: the classifier's logits relative to the lightest upsampler's, K = M - 1
                (:func:`relative_to_lightest`), any float dtype; of one whole image where the
                policy is global.
            log_costs_M: natural logarithms of the upsamplers' relative costs.

        Returns:
            (B, H, W) uint8 in 0..M-1, 0 the lightest.

        Raises:
            UserError: the policy does not work with M upsamplers.
        """
        ...

    def describe(self) -> str:
        """The policy in a few words, for logs and tables."""
        ...


@dataclass(frozen=True)
class KRouting:
    """argmax_j p_j / c_j^k: the larger k, the cheaper; k = 0 takes the most probable upsampler.

    Evaluated in the log domain, so any finite k works. With two upsamplers it is the margin rule
    ``logit_heavy - logit_light > k ln(c_heavy / c_light)``.
    """

    is_global: ClassVar[bool] = False
    k: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.k):
            raise UserError(f"--k {self.k}: k must be a finite number")

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See :class:`Routing`."""
        _check_count(margins_BKHW, log_costs_M)
        k = max(-MAX_K, min(self.k, MAX_K))
        # Scores relative to the lightest upsampler, whose own score is 0.
        classes = _all_light(margins_BKHW)
        best = torch.zeros_like(classes, dtype=torch.float32)
        for j, margin in enumerate(margins_BKHW.unbind(1), start=1):
            score = margin.float() - k * (log_costs_M[j] - log_costs_M[0])
            better = score > best
            # As bytes: to fill where a mask holds takes five times as long.
            torch.maximum(classes, better.view(torch.uint8) * j, out=classes)
            if j + 1 < len(log_costs_M):
                best = torch.where(better, score, best)
        return classes

    def describe(self) -> str:
        return f"k = {self.k:g}"


@dataclass(frozen=True)
class FixedRouting:
    """The same upsampler everywhere; negative indices count from the heaviest, -1."""

    is_global: ClassVar[bool] = False
    index: int

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See :class:`Routing`."""
        _check_count(margins_BKHW, log_costs_M)
        index = range(len(log_costs_M))[self.index]
        return _all_light(margins_BKHW).fill_(index)

    def describe(self) -> str:
        return "all-heavy" if self.index == -1 else f"upsampler {self.index} everywhere"


@dataclass(frozen=True)
class AdaptiveRouting:
    """ADM: the published automatic threshold for two upsamplers.

    The heavy upsampler's probability, scaled to [0, 1] over the image, is split into two clusters
    (:func:`lloyd_threshold`); pixels of the upper one are heavy. A constant image has no spread and
    is light throughout.
    """

    is_global: ClassVar[bool] = True

    def classes(self, margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> Tensor:
        """See :class:`Routing`."""
        _check_count(margins_BKHW, log_costs_M)
        check_adaptive(len(log_costs_M))
        if margins_BKHW.device.type != "cpu" and _is_right_on(margins_BKHW.device):
            from models.kernels.adaptive import adaptive_classes  # needs Triton

            return adaptive_classes(margins_BKHW[:, 0])
        return classes_by_histogram(margins_BKHW)

    def describe(self) -> str:
        return "adaptive (ADM)"


def check_adaptive(upsamplers: int) -> None:
    """Refuse ADM for another number of upsamplers than two.

    Raises:
        UserError: it is another.
    """
    if upsamplers != 2:
        raise UserError(
            f"--adaptive works with 2 upsamplers and this model has {upsamplers}: use --k"
        )


def classes_by_histogram(margins_BKHW: Tensor) -> Tensor:
    """ADM's classes (B, H, W) uint8 by plain torch, and by the CPU's kernels, on any device.

    Args:
        margins_BKHW: of a whole image, K = 1.
    """
    scores = HeavyScores(margins_BKHW)
    threshold = lloyd_threshold(scores.histogram().cpu())
    classes = _all_light(margins_BKHW)
    chunks = classes.view(-1).split(_chunk_pixels(classes))
    for chunk, of_chunk in zip(chunks, scores, strict=True):
        torch.gt(of_chunk, threshold, out=chunk.view(torch.bool))
    return classes


class HeavyScores:
    """The heavy upsampler's probability, min-max scaled over the image, in chunks of pixels.

    Iterating gives flat float32 tensors in [0, 1], in the order of pixels, so that an image of any
    size takes little memory: that of a chunk, or of KEPT_SCORES, which are computed once only.
    A constant image has score 0 everywhere.

    Args:
        margins_BKHW: of a whole image, K = 1.
    """

    def __init__(self, margins_BKHW: Tensor) -> None:
        self._margins = margins_BKHW[:, 0].reshape(-1)
        self._low, self._span = extreme_scores(self._margins)
        self._kept: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        if len(self._margins) > KEPT_SCORES:
            return self._computed()
        if self._kept is None:
            self._kept = list(self._computed())
        return iter(self._kept)

    def _computed(self) -> Iterator[Tensor]:
        for chunk in self._margins.split(_chunk_pixels(self._margins)):
            yield chunk.float().sigmoid().sub_(self._low).div_(self._span).clamp_(0, 1)

    def histogram(self) -> Tensor:
        """(2, bins) float64: each bin's count and its scores' sum; no CUDA device is waited for."""
        like = self._low
        if like.device.type == "cpu" and (kernels := library()) is not None:
            return histogram_of(kernels, self, _SCORE_BINS)
        # Apple's GPUs have no float64.
        device = like.device if like.device.type == "cuda" else torch.device("cpu")
        histogram = torch.zeros(2, _SCORE_BINS, dtype=torch.float64, device=device)
        one = histogram.new_ones(())
        for scores in self:
            chunk = scores.to(device)
            # Clamped: 1.0 belongs to the last bin, and NaN must not become an index out of range.
            bins = (chunk * _SCORE_BINS).to(torch.int32).clamp_(0, _SCORE_BINS - 1)
            histogram[0].index_add_(0, bins, one.expand(len(bins)))
            histogram[1].index_add_(0, bins, chunk.double())
        return histogram


def extreme_scores(margins: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest probability of an image, and how far the highest is above it: infinitely where
    there is no difference, so that all scores are 0. Scalars, float32."""
    # The sigmoid is monotonic, so the extremes can be found before it.
    low, high = torch.stack(torch.aminmax(margins)).float().sigmoid()
    span = high - low
    return low, span.where(span > 0, math.inf)


@functools.cache
def _is_right_on(device: torch.device) -> bool:
    """Whether the GPU kernel's classes are those of the histogram, on a small image."""
    from models import kernels  # it imports the backbones

    def is_right() -> bool:
        from models.kernels.adaptive import adaptive_classes  # needs Triton

        margins = torch.linspace(-6, 3, 5000).roll(1234).view(1, 50, 100)
        expected = classes_by_histogram(margins[:, None])
        # A bin of the histogram goes to one side as a whole.
        return int((adaptive_classes(margins.to(device)).cpu() != expected).sum()) <= 1

    return kernels.agrees("ADM", device, is_right)


def _chunk_pixels(like: Tensor) -> int:
    return _CHUNK_PIXELS if like.device.type == "cpu" else _DEVICE_CHUNK_PIXELS


def lloyd_threshold(histogram_2N: Tensor) -> float:
    """Two clusters by Lloyd's iterations, as the threshold between them.

    In one dimension an assignment is a threshold half-way between the centroids. They start at 0
    and at the mean of all scores; an empty cluster's centroid becomes 0; the iterations end when
    the sum of the squared centroid moves is at most 1e-4, or after the published number of them.
    What counts is the last assignment, not the centroids computed from it.

    Args:
        histogram_2N: float64 on the CPU: how many scores there are from n/N to (n + 1)/N, and
            their sum. They go to one cluster as a whole, so 1/N is the precision.

    Returns:
        the last threshold; scores above it make up the upper cluster.
    """
    bins = histogram_2N.shape[1]
    counts, sums = histogram_2N.numpy()
    # With a 0 before the first: what is below each bin.
    counts_below, sums_below = torch.nn.functional.pad(histogram_2N.cumsum(1), (1, 0)).numpy()
    light, heavy = 0.0, float(sums_below[-1] / counts_below[-1])
    for _ in range(LLOYD_STEPS):
        threshold = (light + heavy) / 2
        # The bin that it falls into; of NaN, for which no comparison holds, the first.
        split = min(int(threshold * bins), bins - 1) if threshold > 0 else 0
        split += bool(_mean(sums[split], counts[split]) <= threshold)
        below = _mean(sums_below[split], counts_below[split])
        above = _mean(sums_below[-1] - sums_below[split], counts_below[-1] - counts_below[split])
        moved = (below - light) ** 2 + (above - heavy) ** 2
        light, heavy = below, above
        if moved <= LLOYD_TOLERANCE:
            break
    return threshold


def _mean(total: float, count: float) -> float:
    return float(total / count) if count > 0 else 0.0


def relative_to_lightest(logits_BMHW: Tensor) -> Tensor:
    """Logits (B, M, H, W) to margins (B, M - 1, H, W): all that a policy needs of them."""
    return logits_BMHW[:, 1:] - logits_BMHW[:, :1]


def _all_light(margins_BKHW: Tensor) -> Tensor:
    shape = (margins_BKHW.shape[0], *margins_BKHW.shape[2:])
    return torch.zeros(shape, dtype=torch.uint8, device=margins_BKHW.device)


def _check_count(margins_BKHW: Tensor, log_costs_M: Sequence[float]) -> None:
    if margins_BKHW.ndim != 4 or margins_BKHW.shape[1] != len(log_costs_M) - 1:
        raise ValueError(
            f"routing: margins (B, M - 1, H, W) and M costs expected, got "
            f"{tuple(margins_BKHW.shape)} and {len(log_costs_M)} costs"
        )
