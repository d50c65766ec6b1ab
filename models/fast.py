"""The fast engine: equal to `models.reference` up to rounding, and what users run.

What makes it fast: the first layer of every MLP runs once per LR pixel (see `models.sampler`);
batch norm is folded and convolutions run channels-last; each pixel goes through its own upsampler
only, gathered in blocks that stay in cache; there is no temporary of the output's size but the
output and the class map.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins, Q pixels, D hidden
width.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.cost import UpsamplingCost
from models.grid import PixelGrid
from models.inference import Upsampled
from models.packed import PackedSampler
from models.pcsr import PCSR
from models.sampler import LIIFSampler

# Sizes that keep a block's data in a CPU's L2 cache: 4096 pixels of a heavy upsampler of width 80
# are 1.3 MB.
BLOCK_PX = 1024
CHUNK_PX = 4096
# LR pixels of an encoder's run of rows. Measured on CARN: 4096 to 16384 take the same time, longer
# ones fall out of the cache; an image of up to 32768 is fastest at once.
RUN_PX = 8192
HALF_MULTIPLE = 1024
HALF_MIN_WIDTH = 48


class FastEngine:
    """A PCSR model packed for inference; its weights are copied, the model is left as it is.

    Args:
        model: in eval mode, on its device.
        block_px: LR pixels that are worked on at once.
        chunk_px: output pixels that go through an upsampler at once.
        run_px: LR pixels that go through the encoder at once.
        dtype: of convolutions and products. Images, margins and sums stay float32.
    """

    def __init__(
        self,
        model: PCSR,
        *,
        block_px: int = BLOCK_PX,
        chunk_px: int = CHUNK_PX,
        run_px: int = RUN_PX,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.norm = model.norm
        self.encoder = model.encoder.fused(dtype)
        self.lag_rows = model.encoder.receptive_radius_px
        self.upsamplers = [PackedSampler.pack(sampler, dtype=dtype) for sampler in model.upsamplers]
        self.classifier = None
        if model.classifier is not None:
            self.classifier = PackedSampler.pack(
                model.classifier, dtype=_product_dtype(model.classifier, dtype), margins=True
            )
        self.dtype = dtype
        self.block_px = block_px
        self.chunk_px = chunk_px
        self.run_px = run_px

    def encode(self, lr: Tensor) -> Tensor:
        x = self.norm.normalise(lr).to(self.dtype)
        return self.encoder(x.contiguous(memory_format=torch.channels_last))

    def encode_rows(self, lr: Tensor) -> Iterator[Tensor]:
        stream = self.encoder.stream()
        if stream is None:
            yield self.encode(lr)
            return
        h, w = lr.shape[-2:]
        step = self._pushed_rows(h, w)
        for first in range(0, h, step):
            x = self.norm.normalise(lr[:, :, first : first + step]).to(self.dtype)
            rows = stream.push(x.permute(0, 2, 3, 1).contiguous(), last=first + step >= h)
            if rows.shape[1]:
                yield rows.permute(0, 3, 1, 2)

    def run_rows(self, lr_size: tuple[int, int]) -> list[int]:
        h, w = lr_size
        if self.encoder.stream() is None:
            return [h]
        step = self._pushed_rows(h, w)
        ends = [max(0, last - self.lag_rows) for last in range(step, h, step)]
        rows = [end - start for start, end in itertools.pairwise([0, *ends, h])]
        return [count for count in rows if count]

    def _pushed_rows(self, h: int, w: int) -> int:
        """Rows that the encoder's stream is given at once."""
        return h if h * w <= 4 * self.run_px else max(1, self.run_px // w)

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        lasts = itertools.accumulate(run_rows)
        parts = (grid.part(last - r, last)[0] for last, r in zip(lasts, run_rows, strict=True))
        strips = [strip for part in parts for strip in self._strip_sizes(part)]
        starts = itertools.accumulate((rows for rows, _ in strips), initial=0)
        classifier = 0
        if self.classifier is not None:
            W = grid.cols.out_len
            classifier = sum(self.classifier.flops(lr_px, rows * W) for rows, lr_px in strips)
        first_layers = [
            [packed.flops(lr_px, 0) for packed in self.upsamplers] for _, lr_px in strips
        ]
        return UpsamplingCost(
            fixed=classifier,
            pixel=tuple(packed.flops(0, 1) for packed in self.upsamplers),
            strip_starts=tuple(starts)[:-1],
            strip=np.array(first_layers, np.float64),
        )

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        packed = self.classifier
        outputs = packed.out_dim if packed else 0
        shape = (len(feat_BChw), outputs, *grid.out_size)
        margins_BKHW = torch.empty(shape, dtype=torch.float32, device=feat_BChw.device)
        if packed is None:
            return margins_BKHW, 0
        flops = 0
        scale = grid.integer_scale
        for margins_KHW, feat_hwC in zip(margins_BKHW, _pixel_major(feat_BChw), strict=True):
            if scale is None:
                flops += self._margins_any(packed, margins_KHW, feat_hwC, grid)
            else:
                flops += self._margins_phases(packed, margins_KHW, feat_hwC, grid, scale)
        return margins_BKHW, flops

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        sr = grid.bilinear(lr)
        work = _Work(len(self.upsamplers))
        scale = grid.integer_scale
        for sr_3HW, feat_hwC, classes_HW in zip(
            sr, _pixel_major(feat_BChw), classes_BHW, strict=True
        ):
            if scale is None:
                self._add_any(sr_3HW, feat_hwC, grid, classes_HW, work)
            else:
                self._add_phases(sr_3HW, feat_hwC, grid, classes_HW, scale, work)
        return Upsampled(sr, work.pixel_counts, work.flops)

    def _margins_phases(
        self,
        packed: PackedSampler,
        out_KHW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        scale: int,
    ) -> int:
        phases_PD = packed.phases(grid, scale)
        h, w = feat_hwC.shape[:2]
        out_KhSwS = out_KHW.view(-1, h, scale, w, scale)
        for rows in self._strips(h, w):
            lr_QD = packed.lr_part(feat_hwC[rows].flatten(0, 1))
            y_PQK = packed.finish((lr_QD + phases_PD[:, None]).flatten(0, 1))
            y_SSrwK = y_PQK.view(scale, scale, -1, w, packed.out_dim)
            out_KhSwS[:, rows] = y_SSrwK.permute(4, 2, 0, 3, 1)
        return packed.flops(h * w, out_KHW[0].numel())

    def _margins_any(
        self, packed: PackedSampler, out_KHW: Tensor, feat_hwC: Tensor, grid: PixelGrid
    ) -> int:
        flops = 0
        rows_HD, cols_WD = packed.axes(grid)
        for first, last, lr_rows in self._out_strips(grid):
            lr_hwD = packed.lr_part(feat_hwC[lr_rows])
            source = grid.rows.nearest[first:last] - lr_rows.start
            x = lr_hwD[source][:, grid.cols.nearest] + rows_HD[first:last, None] + cols_WD
            y_QK = packed.finish(x.flatten(0, 1))
            out_KHW[:, first:last] = y_QK.t().unflatten(1, (last - first, -1))
            flops += packed.flops(lr_hwD[..., 0].numel(), len(y_QK))
        return flops

    def _add_phases(
        self,
        sr_3HW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        classes_HW: Tensor,
        scale: int,
        work: "_Work",
    ) -> None:
        h, w = feat_hwC.shape[:2]
        sr_3hSwS = sr_3HW.view(3, h, scale, w, scale)
        classes_hSwS = classes_HW.view(h, scale, w, scale)
        tables = [packed.phases(grid, scale) for packed in self.upsamplers]
        std = self.norm.std.flatten()
        for rows in self._strips(h, w):
            feat_QC = feat_hwC[rows].flatten(0, 1)
            # Phase by phase, so that what a phase adds is added to a contiguous run of pixels.
            classes_PQ = classes_hSwS[rows].permute(1, 3, 0, 2).reshape(scale * scale, -1)
            residual = sr_3HW.new_empty(classes_PQ.numel(), 3)
            for j, packed in enumerate(self.upsamplers):
                mask_PQ = classes_PQ == j
                ends = mask_PQ.sum(dim=1).cumsum(0).tolist()
                if ends[-1] == 0:
                    continue
                work.add(j, ends[-1], packed.flops(len(feat_QC), ends[-1]))
                phase, source = mask_PQ.nonzero(as_tuple=True)
                target = phase.mul_(classes_PQ.shape[1]).add_(source)
                lr_QD = packed.lr_part(feat_QC)
                for run in _runs(ends, self.chunk_px):
                    part = slice(run[0][1], run[-1][2])
                    x_QD = lr_QD.index_select(0, self._padded(source[part], packed))
                    for index, start, end in run:
                        x_QD[start - part.start : end - part.start].add_(tables[j][index])
                    y_Q3 = packed.finish(x_QD)[: part.stop - part.start]
                    residual.index_copy_(0, target[part], y_Q3.float())
            residual_SSrw3 = (residual * std).view(scale, scale, -1, w, 3)
            sr_3hSwS[:, rows].add_(residual_SSrw3.permute(4, 2, 0, 3, 1))

    def _add_any(
        self,
        sr_3HW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        classes_HW: Tensor,
        work: "_Work",
    ) -> None:
        tables = [packed.axes(grid) for packed in self.upsamplers]
        std = self.norm.std.flatten()
        W, w = grid.cols.out_len, grid.cols.lr_len
        for first, last, lr_rows in self._out_strips(grid):
            feat_QC = feat_hwC[lr_rows].flatten(0, 1)
            chosen = classes_HW[first:last].flatten()
            residual_Q3 = sr_3HW.new_empty(len(chosen), 3)
            for j, packed in enumerate(self.upsamplers):
                picked = (chosen == j).nonzero()[:, 0]
                if len(picked) == 0:
                    continue
                work.add(j, len(picked), packed.flops(len(feat_QC), len(picked)))
                row, col = picked // W + first, picked % W
                source = (grid.rows.nearest[row] - lr_rows.start) * w + grid.cols.nearest[col]
                rows_HD, cols_WD = tables[j]
                x_QD = packed.lr_part(feat_QC).index_select(0, self._padded(source, packed))
                x_QD[: len(picked)].add_(rows_HD[row]).add_(cols_WD[col])
                residual_Q3.index_copy_(0, picked, packed.finish(x_QD)[: len(picked)].float())
            sr_3HW[:, first:last].add_((residual_Q3 * std).t().unflatten(1, (last - first, W)))

    @staticmethod
    def _padded(index_Q: Tensor, packed: PackedSampler) -> Tensor:
        """`index_Q`, for products in half precision with zeros up to a multiple.

        Half-precision products on a CPU are prepared anew for every number of rows, which takes
        longer than the product (measured: 0.35 us a pixel, the product 0.1 to 0.2).
        """
        if packed.feature_CD.dtype == torch.float32 or index_Q.device.type != "cpu":
            return index_Q
        return F.pad(index_Q, (0, -len(index_Q) % HALF_MULTIPLE))

    def _strips(self, h: int, w: int) -> Iterator[slice]:
        """Strips of LR rows of about `block_px` pixels."""
        step = max(1, self.block_px // w)
        for start in range(0, h, step):
            yield slice(start, min(h, start + step))

    def _strip_sizes(self, grid: PixelGrid) -> Iterator[tuple[int, int]]:
        """Output rows and LR pixels of each strip."""
        h, w, scale = grid.rows.lr_len, grid.cols.lr_len, grid.integer_scale
        if scale is None:
            for first, last, lr_rows in self._out_strips(grid):
                yield last - first, (lr_rows.stop - lr_rows.start) * w
        else:
            for rows in self._strips(h, w):
                count = rows.stop - rows.start
                yield count * scale, count * w

    def _out_strips(self, grid: PixelGrid) -> Iterator[tuple[int, int, slice]]:
        """(first, last) output rows of about `block_px` pixels, and the LR rows they read."""
        H, W = grid.out_size
        step = max(1, self.block_px // W)
        for first in range(0, H, step):
            last = min(H, first + step)
            nearest = grid.rows.nearest
            yield first, last, slice(int(nearest[first]), int(nearest[last - 1]) + 1)


def _product_dtype(sampler: LIIFSampler, dtype: torch.dtype) -> torch.dtype:
    """Half precision for wide MLPs only: on a CPU narrow ones are no faster in it."""
    narrow = max(layer.out_features for layer in sampler.imnet.linears) < HALF_MIN_WIDTH
    on_cpu = sampler.imnet.linears[0].weight.device.type == "cpu"
    return torch.float32 if narrow and on_cpu else dtype


class _Work:
    """What upsampling did: pixels per upsampler and executed FLOPs."""

    def __init__(self, upsamplers: int) -> None:
        self.pixel_counts = [0] * upsamplers
        self.flops = 0

    def add(self, upsampler: int, pixels: int, flops: int) -> None:
        self.pixel_counts[upsampler] += pixels
        self.flops += flops


def _pixel_major(feat_BChw: Tensor) -> Tensor:
    """(B, h, w, C), contiguous; a view where the features are channels-last in memory."""
    return feat_BChw.permute(0, 2, 3, 1).contiguous()


def _runs(ends: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group consecutive (phase, start, end) so that a group holds about `most` pixels."""
    run: list[tuple[int, int, int]] = []
    start = 0
    for phase, end in enumerate(ends):
        if run and end - run[0][1] > most:
            yield run
            run = []
        run.append((phase, start, end))
        start = end
    yield run
