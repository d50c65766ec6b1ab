"""Inference with a PCSR model in overlapping patches, whose overlaps are averaged.

Axes: B batch, h w LR, H W output.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.grid import PixelGrid
from models.inference import Engine, SRResult, summed
from models.refinement import refine
from models.routing import Routing
from utils.errors import UserError

PATCH_BATCH_SIZE = 96


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
    counts = []
    first = 0
    for feat in features:
        part = slice(first, first + len(feat))
        out = engine.upsample(patches[part], feat, grid, classes[part])
        counts.append(out.pixel_counts)
        flops += out.flops
        sr = refine(out.sr, classes[part]) if refinement else out.sr
        for corner, image, class_map in zip(corners[part], sr, classes[part], strict=True):
            canvas.add((_scaled(corner[0], scale), _scaled(corner[1], scale)), image, class_map)
        first = part.stop
    encoded_size = (len(corners), ph, pw)
    return SRResult(canvas.mean(), canvas.classes[None], summed(counts), encoded_size, flops)


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
