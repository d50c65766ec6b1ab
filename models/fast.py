"""The fast inference path: equal to `models.inference` up to rounding, and what users run.

What makes it fast: the first layer of every MLP runs once per LR pixel (see `models.sampler`);
batch norm is folded and convolutions run channels-last; each pixel goes through its own upsampler
only, gathered in blocks that stay in cache; there is no temporary of the output's size but the
output and the class map.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins, Q pixels, D hidden
width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from models.fuse import fused_encoder
from models.grid import PixelGrid
from models.inference import SRResult
from models.packed import PackedSampler
from models.pcsr import PCSR
from models.refinement import refine
from models.routing import Routing

# LR pixels of a block on a CPU: 4096 x 80 floats of a heavy upsampler are 1.3 MB, under L2's 2 MB.
CPU_BLOCK_PX = 4096


class FastPCSR:
    """A PCSR model packed for inference; its weights are copied, the model is left as it is.

    Args:
        model: in eval mode, on its device.
        block_px: LR pixels that are worked on at once.
    """

    def __init__(self, model: PCSR, *, block_px: int = CPU_BLOCK_PX) -> None:
        self.norm = model.norm
        self.skip = model.skip
        self.encoder = fused_encoder(model.encoder)
        self.upsamplers = [PackedSampler.pack(sampler) for sampler in model.upsamplers]
        self.classifier = None
        if model.classifier is not None:
            self.classifier = PackedSampler.pack(model.classifier, margins=True)
        self.block_px = block_px

    @torch.inference_mode()
    def super_resolve(
        self,
        lr: Tensor,
        size: tuple[int, int],
        routing: Routing,
        log_costs: Sequence[float],
        *,
        refinement: bool = True,
    ) -> SRResult:
        """Super-resolve whole images, each routed on its own; see `models.inference`."""
        results = [self._one(image[None], size, routing, log_costs, refinement) for image in lr]
        counts = [sum(per_class) for per_class in zip(*(r[2] for r in results), strict=True)]
        return SRResult(
            torch.cat([r[0] for r in results]),
            torch.cat([r[1] for r in results]),
            counts,
            (len(lr), lr.shape[-2], lr.shape[-1]),
        )

    def _one(
        self,
        lr: Tensor,
        size: tuple[int, int],
        routing: Routing,
        log_costs: Sequence[float],
        refinement: bool,
    ) -> tuple[Tensor, Tensor, list[int]]:
        feat = self.encoder(self.norm.normalise(lr))
        feat_hwC = feat[0].permute(1, 2, 0).contiguous()
        grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
        margins = self._margins(feat_hwC, grid)
        classes = routing.classes(margins, log_costs)
        sr = self.skip(lr, size)
        counts = self._add_residuals(sr, feat_hwC, grid, classes[0])
        return (refine(sr, classes) if refinement else sr), classes, counts

    def _margins(self, feat_hwC: Tensor, grid: PixelGrid) -> Tensor:
        """(1, K, H, W) float32: the classifier's logits relative to the lightest upsampler's."""
        H, W = grid.out_size
        if self.classifier is None:
            return feat_hwC.new_zeros(1, 0, H, W, dtype=torch.float32)
        margins_KHW = feat_hwC.new_empty(self.classifier.out_dim, H, W, dtype=torch.float32)
        if grid.integer_scale is None:
            self._margins_any(margins_KHW, feat_hwC, grid)
        else:
            self._margins_phases(margins_KHW, feat_hwC, grid, grid.integer_scale)
        return margins_KHW[None]

    def _margins_phases(
        self, out_KHW: Tensor, feat_hwC: Tensor, grid: PixelGrid, scale: int
    ) -> None:
        assert self.classifier is not None
        packed = self.classifier
        phases = packed.phases(grid, scale)
        h, w = feat_hwC.shape[:2]
        out_KhswS = out_KHW.view(-1, h, scale, w, scale)
        for rows in self._strips(h, w):
            lr_QD = feat_hwC[rows].flatten(0, 1) @ packed.feature_CD
            for index, phase in enumerate(phases):
                y_QK = packed.finish(lr_QD + phase)
                out_KhswS[:, rows, index // scale, :, index % scale] = y_QK.t().unflatten(
                    1, (-1, w)
                )

    def _margins_any(self, out_KHW: Tensor, feat_hwC: Tensor, grid: PixelGrid) -> None:
        assert self.classifier is not None
        packed = self.classifier
        rows_HD, cols_WD = packed.axes(grid)
        for first, last, lr_rows in self._out_strips(grid):
            lr_hwD = feat_hwC[lr_rows] @ packed.feature_CD
            source = grid.rows.nearest[first:last] - lr_rows.start
            x = lr_hwD[source][:, grid.cols.nearest] + rows_HD[first:last, None] + cols_WD
            y_QK = packed.finish(x.flatten(0, 1))
            out_KHW[:, first:last] = y_QK.t().unflatten(1, (last - first, -1))

    def _add_residuals(
        self, sr: Tensor, feat_hwC: Tensor, grid: PixelGrid, classes_HW: Tensor
    ) -> list[int]:
        """Add each pixel's upsampler to `sr` (1, 3, H, W) in place; pixels per upsampler."""
        std = self.norm.std.flatten()
        if grid.integer_scale is None:
            return self._add_any(sr[0], feat_hwC, grid, classes_HW, std)
        return self._add_phases(sr[0], feat_hwC, grid, classes_HW, std, grid.integer_scale)

    def _add_phases(
        self,
        sr_3HW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        classes_HW: Tensor,
        std: Tensor,
        scale: int,
    ) -> list[int]:
        h, w = feat_hwC.shape[:2]
        sr = sr_3HW.view(3, h, scale, w, scale)
        classes = classes_HW.view(h, scale, w, scale)
        tables = [packed.phases(grid, scale) for packed in self.upsamplers]
        counts = [0] * len(self.upsamplers)
        for rows in self._strips(h, w):
            feat_QC = feat_hwC[rows].flatten(0, 1)
            lr_parts = [feat_QC @ packed.feature_CD for packed in self.upsamplers]
            for index in range(scale * scale):
                y, x = divmod(index, scale)
                chosen = classes[rows, y, :, x].flatten()
                residual_Q3 = feat_QC.new_empty(len(chosen), 3)
                for j, packed in enumerate(self.upsamplers):
                    picked = (chosen == j).nonzero()[:, 0]
                    counts[j] += len(picked)
                    x_QD = lr_parts[j].index_select(0, picked).add_(tables[j][index])
                    residual_Q3.index_copy_(0, picked, packed.finish(x_QD))
                sr[:, rows, y, :, x] += (residual_Q3 * std).t().unflatten(1, (-1, w))
        return counts

    def _add_any(
        self,
        sr_3HW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        classes_HW: Tensor,
        std: Tensor,
    ) -> list[int]:
        tables = [packed.axes(grid) for packed in self.upsamplers]
        counts = [0] * len(self.upsamplers)
        W, w = grid.cols.out_len, grid.cols.lr_len
        for first, last, lr_rows in self._out_strips(grid):
            feat_QC = feat_hwC[lr_rows].flatten(0, 1)
            chosen = classes_HW[first:last].flatten()
            residual_Q3 = feat_QC.new_empty(len(chosen), 3)
            for j, packed in enumerate(self.upsamplers):
                picked = (chosen == j).nonzero()[:, 0]
                counts[j] += len(picked)
                row, col = picked // W + first, picked % W
                source = (grid.rows.nearest[row] - lr_rows.start) * w + grid.cols.nearest[col]
                rows_HD, cols_WD = tables[j]
                x_QD = (feat_QC @ packed.feature_CD).index_select(0, source)
                x_QD.add_(rows_HD[row]).add_(cols_WD[col])
                residual_Q3.index_copy_(0, picked, packed.finish(x_QD))
            sr_3HW[:, first:last] += (residual_Q3 * std).t().unflatten(1, (last - first, W))
        return counts

    def _strips(self, h: int, w: int) -> Iterator[slice]:
        """Strips of LR rows of about `block_px` pixels."""
        step = max(1, self.block_px // w)
        for start in range(0, h, step):
            yield slice(start, min(h, start + step))

    def _out_strips(self, grid: PixelGrid) -> Iterator[tuple[int, int, slice]]:
        """(first, last) output rows of about `block_px` pixels, and the LR rows they read."""
        H, W = grid.out_size
        step = max(1, self.block_px // W)
        for first in range(0, H, step):
            last = min(H, first + step)
            nearest = grid.rows.nearest
            yield first, last, slice(int(nearest[first]), int(nearest[last - 1]) + 1)
