"""Inference with a PCSR model on whole images, on any engine.

An :class:`Engine` computes; what is here decides in which order and on what. `models.reference`
is the straightforward engine, `models.fast` the one that users run.

Axes: B batch, C channels, h w LR, H W output, M upsamplers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from models.cost import UpsamplingCost
from models.grid import PixelGrid
from models.refinement import RefineRows
from models.routing import Routing

# Values, whatever their type (512 MiB of float32); 1920x1080 LR pixels have 108e6 at 52 channels.
KEPT_FEATURES = 2**27


@dataclass(frozen=True)
class Upsampled:
    """What an engine's upsamplers give.

    Attributes:
        sr: (B, 3, H, W) RGB, the bilinear LR included, not clamped.
        pixel_counts: pixels that each upsampler computed, light to heavy.
        flops: executed for it (2 per multiply-add).
    """

    sr: Tensor
    pixel_counts: list[int]
    flops: int


class Engine(Protocol):
    """The three parts of a PCSR model; implementations agree up to rounding.

    Attributes:
        dtype: of convolutions and products. Features may be wider.
    """

    dtype: torch.dtype

    def encode(self, lr: Tensor) -> Tensor:
        """Features (B, C, h, w) of `lr` (B, 3, h, w), float RGB in [0, 1]."""
        ...

    def encode_rows(self, lr: Tensor) -> Iterator[Tensor]:
        """The same features in runs of rows (B, C, r, w), from top to bottom."""
        ...

    def run_rows(self, lr_size: tuple[int, int]) -> list[int]:
        """How many LR rows each run of :meth:`encode_rows` has on an image of (h, w)."""
        ...

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        """What classifier and upsamplers execute on an image, in FLOPs.

        Args:
            grid: of the whole image, or of one of its patches.
            run_rows: LR rows that :meth:`upsample` is given at once.
        """
        ...

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        """Margins (B, M - 1, H, W) float32, see `models.routing`, and the executed FLOPs."""
        ...

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        """Each pixel through the upsampler of its class."""
        ...


@dataclass(frozen=True)
class SRResult:
    """What inference gives.

    Attributes:
        sr: (B, 3, H, W) RGB, the bilinear LR included, not clamped.
        classes: (B, H, W) uint8, the upsampler of each pixel, 0 the lightest. In patch mode the
            largest class among the overlapping patches.
        pixel_counts: pixels that each upsampler computed, light to heavy. In patch mode pixels of
            overlaps count once per patch.
        encoded_size: (images or patches, h, w) of what the encoder ran on.
        mlp_flops: executed by classifier and upsamplers.
        encoder_passes: how often the encoder ran on it: twice where features were too many to be
            kept until all pixels were routed.
    """

    sr: Tensor
    classes: Tensor
    pixel_counts: list[int]
    encoded_size: tuple[int, int, int]
    mlp_flops: int
    encoder_passes: int = 1


@torch.inference_mode()
def super_resolve(
    engine: Engine,
    lr: Tensor,
    size: tuple[int, int],
    routing: Routing,
    log_costs: Sequence[float],
    *,
    refinement: bool = True,
) -> SRResult:
    """Super-resolve whole images, each routed on its own.

    Beside the output, memory holds runs of rows only; and where `routing.is_global`, the image's
    margins, and its features as far as KEPT_FEATURES go (beyond, they are computed twice).

    Args:
        lr: (B, 3, h, w) float RGB in [0, 1], any h, w >= 1.
        size: output (H, W).
        routing: which upsampler each pixel gets.
        log_costs: (M,) logarithms of the relative costs, see `utils.flops`.
        refinement: smooth the borders between regions of different upsamplers.
    """
    results = [
        _one_image(engine, image, size, routing, log_costs, refinement) for image in lr.split(1)
    ]
    if len(results) == 1:
        return results[0]
    return SRResult(
        sr=torch.cat([result.sr for result in results]),
        classes=torch.cat([result.classes for result in results]),
        pixel_counts=summed([result.pixel_counts for result in results]),
        encoded_size=(len(lr), lr.shape[-2], lr.shape[-1]),
        mlp_flops=sum(result.mlp_flops for result in results),
        encoder_passes=results[0].encoder_passes,
    )


def _one_image(
    engine: Engine,
    lr: Tensor,
    size: tuple[int, int],
    routing: Routing,
    log_costs: Sequence[float],
    refinement: bool,
) -> SRResult:
    lr_size = (lr.shape[-2], lr.shape[-1])
    grid = PixelGrid.build(lr_size, size, lr.device)
    classes = torch.empty(1, *size, dtype=torch.uint8, device=lr.device)
    runs = engine.encode_rows(lr)
    flops, passes = 0, 1
    if routing.is_global:
        kept, flops = _route_globally(engine, lr, grid, routing, log_costs, classes)
        runs, passes = (engine.encode_rows(lr), 2) if kept is None else (kept.runs(), 1)
    sr = lr.new_empty(1, 3, *size)
    refiner = RefineRows(sr) if refinement else None
    counts = []
    first = 0
    for feat in runs:
        part, rows = grid.part(first, first + feat.shape[2])
        first += feat.shape[2]
        if not routing.is_global:
            margins, classifier_flops = engine.classify(feat, part)
            classes[:, rows] = routing.classes(margins, log_costs)
            flops += classifier_flops
        out = engine.upsample(lr, feat, part, classes[:, rows])
        counts.append(out.pixel_counts)
        flops += out.flops
        if refiner is None:
            sr[:, :, rows] = out.sr
        else:
            refiner.push(out.sr, classes[:, rows], last=first == lr_size[0])
    return SRResult(sr, classes, summed(counts), (1, *lr_size), flops, passes)


def _route_globally(
    engine: Engine,
    lr: Tensor,
    grid: PixelGrid,
    routing: Routing,
    log_costs: Sequence[float],
    classes: Tensor,
) -> tuple["_KeptFeatures | None", int]:
    """Fill `classes` (1, H, W); the features where they were kept, and the classifier's FLOPs."""
    kept = whole = None
    flops = first = 0
    for feat in engine.encode_rows(lr):
        part, rows = grid.part(first, first + feat.shape[2])
        first += feat.shape[2]
        margins, classifier_flops = engine.classify(feat, part)
        flops += classifier_flops
        if whole is None:
            if feat[0, :, 0].numel() * lr.shape[2] <= KEPT_FEATURES:
                kept = _KeptFeatures(feat, lr.shape[2])
            if first == lr.shape[2]:
                whole = margins
                break
            whole = margins.new_empty(*margins.shape[:2], *grid.out_size)
        whole[:, :, rows] = margins
        if kept is not None:
            kept.add(feat)
    assert whole is not None
    classes.copy_(routing.classes(whole, log_costs))
    return kept, flops


class _KeptFeatures:
    """An image's features in one block of memory: many small ones would leave holes between them.

    Args:
        like: the first run of rows (1, C, r, w), which is kept where it is the whole image.
        height: of the LR image.
    """

    def __init__(self, like: Tensor, height: int) -> None:
        _, channels, rows, width = like.shape
        self._whole = like if rows == height else None
        if self._whole is not None:
            return
        # In the order of memory that they come in.
        self._by_channel = like.stride(3) == 1
        shape = (channels, width) if self._by_channel else (width, channels)
        self._rows = like.new_empty(1, height, *shape)
        self._ends = [0]

    def add(self, feat_1Crw: Tensor) -> None:
        """Keep the next run of rows."""
        start = self._ends[-1]
        self._ends.append(start + feat_1Crw.shape[2])
        self._view(start, self._ends[-1]).copy_(feat_1Crw)

    def runs(self) -> Iterator[Tensor]:
        """The runs as they came."""
        if self._whole is not None:
            yield self._whole
            return
        for start, end in pairwise(self._ends):
            yield self._view(start, end)

    def _view(self, start: int, end: int) -> Tensor:
        """(1, C, r, w)."""
        order = (0, 2, 1, 3) if self._by_channel else (0, 3, 1, 2)
        return self._rows[:, start:end].permute(order)


def summed(counts: Sequence[Sequence[int]]) -> list[int]:
    """Pixels of each upsampler over several parts."""
    return [sum(of_upsampler) for of_upsampler in zip(*counts, strict=True)]
