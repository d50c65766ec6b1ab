"""Inference with a PCSR model: whole images or overlapping patches, on any engine.

An :class:`Engine` computes; what is here decides in which order and on what. `models.reference`
is the straightforward engine, `models.fast` the one that users run.

Axes: B batch, C channels, h w LR, H W output, M upsamplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.grid import PixelGrid
from models.refinement import refine
from models.routing import Routing
from utils.errors import UserError

PATCH_BATCH_SIZE = 96


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
    """The three parts of a PCSR model; implementations agree up to rounding."""

    def encode(self, lr: Tensor) -> Tensor:
        """Features (B, C, h, w) of `lr` (B, 3, h, w), float RGB in [0, 1]."""
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
    """

    sr: Tensor
    classes: Tensor
    pixel_counts: list[int]
    encoded_size: tuple[int, int, int]
    mlp_flops: int


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

    Args:
        lr: (B, 3, h, w) float RGB in [0, 1], any h, w >= 1.
        size: output (H, W).
        routing: which upsampler each pixel gets.
        log_costs: (M,) logarithms of the relative costs, see `utils.flops`.
        refinement: smooth the borders between regions of different upsamplers.
    """
    lr_size = (lr.shape[-2], lr.shape[-1])
    feat = engine.encode(lr)
    grid = PixelGrid.build(lr_size, size, lr.device)
    margins, flops = engine.classify(feat, grid)
    classes = torch.cat([routing.classes(image, log_costs) for image in margins.split(1)])
    out = engine.upsample(lr, feat, grid, classes)
    sr = refine(out.sr, classes) if refinement else out.sr
    return SRResult(sr, classes, out.pixel_counts, (len(lr), *lr_size), flops + out.flops)


@torch.inference_mode()
def super_resolve_patches(
    engine: Engine,
    lr: Tensor,
    scale: float,
    routing: Routing,
    log_costs: Sequence[float],
    *,
    patch_size: int = 32,
    step: int = 28,
    refinement: bool = True,
    patch_batch_size: int = PATCH_BATCH_SIZE,
) -> SRResult:
    """Super-resolve one image in overlapping patches, whose overlaps are averaged.

    Refinement works inside each patch, ADM over all patches together. An image smaller than a
    patch is run whole.

    Args:
        lr: (1, 3, h, w) float RGB in [0, 1]; each side is under `patch_size` or a whole number of
            steps longer than it.
        scale: any at which patch size and step are whole numbers of output pixels.
        patch_size, step: in LR pixels.
        patch_batch_size: patches that go through the network at once.

    Raises:
        UserError: sides or scale that patches do not tile.
    """
    h, w = lr.shape[-2:]
    corners, (ph, pw) = patch_corners((h, w), patch_size, step)
    canvas = PatchCanvas((_scaled(h, scale), _scaled(w, scale)), lr)
    patch_out = (_scaled(ph, scale), _scaled(pw, scale))
    patches = torch.cat([lr[..., y : y + ph, x : x + pw] for y, x in corners])
    grid = PixelGrid.build((ph, pw), patch_out, lr.device)
    features = [engine.encode(part) for part in patches.split(patch_batch_size)]
    classified = [engine.classify(feat, grid) for feat in features]
    flops = sum(part_flops for _, part_flops in classified)
    classes = routing.classes(torch.cat([margins for margins, _ in classified]), log_costs)
    counts: list[int] = []
    first = 0
    for feat in features:
        part = slice(first, first + len(feat))
        out = engine.upsample(patches[part], feat, grid, classes[part])
        counts = [a + b for a, b in zip(counts or [0] * 256, out.pixel_counts, strict=False)]
        flops += out.flops
        sr = refine(out.sr, classes[part]) if refinement else out.sr
        for corner, image, class_map in zip(corners[part], sr, classes[part], strict=True):
            canvas.add((_scaled(corner[0], scale), _scaled(corner[1], scale)), image, class_map)
        first = part.stop
    return SRResult(canvas.mean(), canvas.classes[None], counts, (len(corners), ph, pw), flops)


class PatchCanvas:
    """Averages overlapping patches.

    Args:
        size: (H, W) of the whole.
        like: a tensor of the output's dtype and device.
    """

    def __init__(self, size: tuple[int, int], like: Tensor) -> None:
        self._sum = like.new_zeros(3, *size)
        self._weight = like.new_zeros(size)
        self.classes = torch.zeros(size, dtype=torch.uint8, device=like.device)

    def add(
        self, corner: tuple[int, int], patch_3HW: Tensor, classes_HW: Tensor | None = None
    ) -> None:
        """Add a patch whose top left is `corner` (row, column); the larger class is kept."""
        height, width = patch_3HW.shape[-2:]
        area = (slice(corner[0], corner[0] + height), slice(corner[1], corner[1] + width))
        self._sum[:, *area].add_(patch_3HW)
        self._weight[area].add_(1)
        if classes_HW is not None:
            self.classes[area] = torch.maximum(self.classes[area], classes_HW)

    def mean(self) -> Tensor:
        """(1, 3, H, W)."""
        return (self._sum / self._weight)[None]


def patch_corners(
    lr_size: tuple[int, int], patch_size: int, step: int
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Top-left corners of the patches, row by row, and the patch's size.

    An axis shorter than `patch_size` is taken whole.

    Raises:
        UserError: a longer axis that patches do not end on.
    """
    starts, sizes = [], []
    for length in lr_size:
        size = min(length, patch_size)
        if (length - size) % step:
            raise UserError(
                f"patches of {patch_size} with step {step} do not tile {length} LR pixels: "
                f"use --crop or --per_image"
            )
        starts.append(range(0, length - size + 1, step))
        sizes.append(size)
    return [(y, x) for y in starts[0] for x in starts[1]], (sizes[0], sizes[1])


def _scaled(length: int, scale: float) -> int:
    scaled = length * scale
    if abs(scaled - round(scaled)) > 1e-6:
        raise UserError(
            f"patch mode at scale {scale}: {length} LR pixels are not a whole number of output "
            f"pixels; use --per_image"
        )
    return round(scaled)
