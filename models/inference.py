"""The reference inference path: straightforward, pixel by pixel, the oracle for faster ones.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, Q pixels, N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.grid import PixelGrid
from models.pcsr import PCSR
from models.refinement import refine
from models.routing import Routing, relative_to_lightest
from utils.errors import UserError

PIXEL_BATCH_SIZE = 300_000
PATCH_BATCH_SIZE = 96


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
    """

    sr: Tensor
    classes: Tensor
    pixel_counts: list[int]
    encoded_size: tuple[int, int, int]


@torch.inference_mode()
def super_resolve(
    model: PCSR,
    lr: Tensor,
    size: tuple[int, int],
    routing: Routing,
    log_costs: Sequence[float],
    *,
    refinement: bool = True,
    pixel_batch_size: int = PIXEL_BATCH_SIZE,
) -> SRResult:
    """Super-resolve whole images, each routed on its own.

    Args:
        model: in eval mode.
        lr: (B, 3, h, w) float RGB in [0, 1], any h, w >= 1.
        size: output (H, W).
        routing: which upsampler each pixel gets.
        log_costs: (M,) logarithms of the relative costs, see `utils.flops`.
        refinement: smooth the borders between regions of different upsamplers.
        pixel_batch_size: pixels that go through an MLP at once.
    """
    feat = model.encode(lr)
    grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
    margins = _classify(model, feat, grid, pixel_batch_size)
    classes = torch.cat([routing.classes(image, log_costs) for image in margins.split(1)])
    sr, counts = _upsample(model, lr, feat, grid, classes, pixel_batch_size)
    if refinement:
        sr = refine(sr, classes)
    return SRResult(sr, classes, counts, (len(lr), lr.shape[-2], lr.shape[-1]))


@torch.inference_mode()
def super_resolve_patches(
    model: PCSR,
    lr: Tensor,
    scale: float,
    routing: Routing,
    log_costs: Sequence[float],
    *,
    patch_size: int = 32,
    step: int = 28,
    refinement: bool = True,
    pixel_batch_size: int = PIXEL_BATCH_SIZE,
    patch_batch_size: int = PATCH_BATCH_SIZE,
) -> SRResult:
    """Super-resolve one image in overlapping patches, whose overlaps are averaged.

    Refinement works inside each patch, ADM over all patches together. An image smaller than a
    patch is run whole.

    Args:
        model: in eval mode.
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
    out = [_scaled(n, scale) for n in (h, w, ph, pw)]
    patches = torch.cat([lr[..., y : y + ph, x : x + pw] for y, x in corners])
    grid = PixelGrid.build((ph, pw), (out[2], out[3]), lr.device)
    features = torch.cat([model.encode(part) for part in patches.split(patch_batch_size)])
    margins = torch.cat(
        [
            _classify(model, part, grid, pixel_batch_size)
            for part in features.split(patch_batch_size)
        ]
    )
    classes = routing.classes(margins, log_costs)
    total = lr.new_zeros(3, out[0], out[1])
    weight = lr.new_zeros(out[0], out[1])
    heaviest = classes.new_zeros(1, out[0], out[1])
    counts = [0] * len(model.upsamplers)
    for index in torch.arange(len(corners)).split(patch_batch_size):
        part = slice(int(index[0]), int(index[-1]) + 1)
        sr, part_counts = _upsample(
            model, patches[part], features[part], grid, classes[part], pixel_batch_size
        )
        counts = [a + b for a, b in zip(counts, part_counts, strict=True)]
        if refinement:
            sr = refine(sr, classes[part])
        for (y, x), patch, patch_classes in zip(corners[part], sr, classes[part], strict=True):
            top, left = _scaled(y, scale), _scaled(x, scale)
            area = (slice(top, top + out[2]), slice(left, left + out[3]))
            total[:, *area] += patch
            weight[area] += 1
            heaviest[0, *area] = torch.maximum(heaviest[0, *area], patch_classes)
    return SRResult((total / weight)[None], heaviest, counts, (len(corners), ph, pw))


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


def _classify(model: PCSR, feat: Tensor, grid: PixelGrid, pixel_batch_size: int) -> Tensor:
    """Margins (B, M - 1, H, W) of the classifier, see `models.routing`."""
    H, W = grid.out_size
    if model.classifier is None:
        return feat.new_zeros(len(feat), 0, H, W)
    pixels = torch.arange(H * W, device=feat.device)
    parts = [
        model.classifier(feat, grid, part)
        for part in pixels.split(max(1, pixel_batch_size // len(feat)))
    ]
    logits_BMHW = torch.cat(parts, dim=1).transpose(1, 2).unflatten(2, (H, W))
    return relative_to_lightest(logits_BMHW)


def _upsample(
    model: PCSR,
    lr: Tensor,
    feat: Tensor,
    grid: PixelGrid,
    classes: Tensor,
    pixel_batch_size: int,
) -> tuple[Tensor, list[int]]:
    """Each pixel through its upsampler: (B, 3, H, W), and the pixels that each one computed."""
    H, W = grid.out_size
    residual = feat.new_zeros(len(feat), H * W, 3)
    counts = []
    for index, upsampler in enumerate(model.upsamplers):
        count = 0
        for image, class_map in enumerate(classes.flatten(1)):
            chosen = (class_map == index).nonzero()[:, 0]
            count += len(chosen)
            for part in chosen.split(pixel_batch_size):
                residual[image, part] = upsampler(feat[image : image + 1], grid, part)[0]
        counts.append(count)
    residual = residual.transpose(1, 2).unflatten(2, (H, W))
    return residual * model.norm.std + model.skip(lr, grid.out_size), counts
