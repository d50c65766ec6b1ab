"""The fast engine: equal to `models.reference` up to rounding, and what users run.

What makes it fast: the first layer of every MLP runs once per LR pixel (see `models.sampler`);
batch norm is folded and convolutions run channels-last; the lightest upsampler runs without
gathering on the LR rows where a pixel needs it, and each heavier one on its own pixels, gathered in
blocks that stay in cache; there is no temporary of the output's size but the output and
the class map.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins, Q pixels, D hidden
width.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models.cost import UpsamplingCost
from models.elementwise import sums_of_rows
from models.grid import PixelGrid
from models.inference import Upsampled
from models.packed import PackedSampler
from models.pcsr import PCSR
from models.sampler import LIIFSampler
from models.streams import Encoder
from models.strips import lr_strips, out_strips, row_heights, strip_sizes
from models.used_rows import UsedRows

# LR pixels that are worked on at once, and output pixels that go through an upsampler at once.
# Measured on CPUs: what an upsampler of width 80 reads and writes of 4096 pixels a thread just
# fits a cache of 2 MB; half precision takes twice as many.
BLOCK_PX = 4096
CHUNK_PX = 4096
CHUNK_WIDTH = 80
# On other devices: enough to fill a GPU.
DEVICE_BLOCK_PX = 2**18
DEVICE_CHUNK_PX = 2**20
# LR pixels of an encoder's run of rows, in half precision twice as many; an image of up to twice
# that is one run.
RUN_PX = 16384
HALF_MULTIPLE = 1024
HALF_MIN_WIDTH = 48


class FastEngine:
    """A PCSR model packed for inference; its weights are copied, the model is left as it is.

    Args:
        model: in eval mode, on its device.
        block_px: LR pixels that are worked on at once. Default: what suits the device.
        chunk_px: the most output pixels that go through an upsampler at once; fewer where fewer
            suit the device.
        run_px: LR pixels that go through the encoder at once.
        dtype: of convolutions and products. Images, margins and sums stay float32.
        encoder: computes the features in `dtype`; default ``model.encoder.fused(dtype)``.
    """

    def __init__(
        self,
        model: PCSR,
        *,
        block_px: int | None = None,
        chunk_px: int | None = None,
        run_px: int | None = None,
        dtype: torch.dtype = torch.float32,
        encoder: Encoder | None = None,
    ) -> None:
        self.norm = model.norm
        self.encoder = encoder or model.encoder.fused(dtype)
        self.lag_rows = model.encoder.receptive_radius_px
        self.upsamplers = [PackedSampler.pack(sampler, dtype=dtype) for sampler in model.upsamplers]
        self.classifier = None
        if model.classifier is not None:
            self.classifier = PackedSampler.pack(
                model.classifier, dtype=_product_dtype(model.classifier, dtype), margins=True
            )
        self.dtype = dtype
        device = model.norm.mean.device
        suitable = _chunk_px(device, dtype)
        self.block_px = block_px or (BLOCK_PX if device.type == "cpu" else DEVICE_BLOCK_PX)
        self.chunk_px = min(suitable, chunk_px or suitable)
        self.run_px = run_px or RUN_PX * (1 if dtype == torch.float32 else 2)

    def encode(self, lr: Tensor) -> Tensor:
        """See `models.inference.Engine`."""
        x = self.norm.normalise(lr).to(self.encoder.input_dtype)
        return self.encoder(x.contiguous(memory_format=torch.channels_last))

    def encode_rows(self, lr: Tensor) -> Iterator[Tensor]:
        """See `models.inference.Engine`."""
        stream = self.encoder.stream()
        if stream is None:
            yield self.encode(lr)
            return
        h, w = lr.shape[-2:]
        step = self._pushed_rows(h, w)
        for first in range(0, h, step):
            x = self.norm.normalise(lr[:, :, first : first + step]).to(self.encoder.input_dtype)
            rows = stream.push(x.permute(0, 2, 3, 1).contiguous(), last=first + step >= h)
            if rows.shape[1]:
                yield rows.permute(0, 3, 1, 2)

    def run_rows(self, lr_size: tuple[int, int]) -> list[int]:
        """See `models.inference.Engine`."""
        h, w = lr_size
        if self.encoder.stream() is None:
            return [h]
        step = self._pushed_rows(h, w)
        ends = [max(0, last - self.lag_rows) for last in range(step, h, step)]
        rows = [end - start for start, end in itertools.pairwise([0, *ends, h])]
        return [count for count in rows if count]

    def _pushed_rows(self, h: int, w: int) -> int:
        """Rows that the encoder's stream is given at once."""
        return h if h * w <= 2 * self.run_px else max(1, self.run_px // w)

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        """See `models.inference.Engine`."""
        lasts = itertools.accumulate(run_rows)
        parts = [grid.part(last - r, last)[0] for last, r in zip(lasts, run_rows, strict=True)]
        w, W = grid.cols.lr_len, grid.cols.out_len
        classifier = 0
        if self.classifier is not None:
            strips = (strip for part in parts for strip in strip_sizes(part, self.block_px))
            classifier = sum(self.classifier.flops(lr_px, rows * W) for rows, lr_px in strips)
        lightest, *heavier = self.upsamplers
        # The lightest runs on all pixels of an LR row, of the others only the first layer does.
        heights = [rows for part in parts for rows in row_heights(part, self.block_px)]
        starts = itertools.accumulate(heights, initial=0)
        per_row = [
            [lightest.flops(w, rows * W), *(packed.flops(w, 0) for packed in heavier)]
            for rows in heights
        ]
        return UpsamplingCost(
            fixed=classifier,
            pixel=(0, *(packed.flops(0, 1) for packed in heavier)),
            strip_starts=tuple(starts)[:-1],
            strip=np.array(per_row, np.float64),
        )

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        """See `models.inference.Engine`."""
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
        """See `models.inference.Engine`."""
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
        for rows in lr_strips(h, w, self.block_px):
            y_KPQ = self._all_phases(packed, feat_hwC[rows].flatten(0, 1), phases_PD)
            y_KSSrw = y_KPQ.reshape(packed.out_dim, scale, scale, -1, w)
            out_KhSwS[:, rows] = y_KSSrw.permute(0, 3, 1, 4, 2)
        return packed.flops(h * w, out_KHW[0].numel())

    def _margins_any(
        self, packed: PackedSampler, out_KHW: Tensor, feat_hwC: Tensor, grid: PixelGrid
    ) -> int:
        flops = 0
        rows_HD, cols_WD = packed.axes(grid)
        for first, last, lr_rows in out_strips(grid, self.block_px):
            feat_rwC = feat_hwC[lr_rows]
            source = grid.rows.nearest[first:last] - lr_rows.start
            lr_rwD = packed.lr_part(feat_rwC)[source]
            y_KQ = _all_pixels(packed, lr_rwD, rows_HD[first:last], cols_WD, grid)
            out_KHW[:, first:last] = y_KQ.unflatten(1, (last - first, -1))
            flops += packed.flops(feat_rwC[..., 0].numel(), y_KQ.shape[1])
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
        std = self.norm.std.view(3, 1)
        for rows in lr_strips(h, w, self.block_px):
            feat_rwC = feat_hwC[rows]
            # Phase by phase, so that what a phase adds is added to a contiguous run of pixels.
            classes_PQ = classes_hSwS[rows].permute(1, 3, 0, 2).reshape(scale * scale, -1)
            residual_3Q = sr_3HW.new_empty(3, classes_PQ.numel())
            is_light = classes_PQ == 0
            lights = int(is_light.sum())
            if lights:
                lightest = self.upsamplers[0]
                lit = UsedRows(is_light.unflatten(1, (-1, w)).any(2).any(0))
                feat_QC = lit.of(feat_rwC).flatten(0, 1)
                y_3Q = self._all_phases(lightest, feat_QC, tables[0]).float()
                rows_of = (3, scale * scale, -1, w)
                residual_3Q = lit.put(y_3Q.view(rows_of), residual_3Q.view(rows_of), 2).view(3, -1)
                work.add(0, lights, lightest.flops(len(feat_QC), y_3Q.shape[1]))
            for j, packed in enumerate(self.upsamplers[1:], start=1):
                is_own = classes_PQ == j
                phase, source = is_own.nonzero(as_tuple=True)
                if len(phase) == 0:
                    continue
                target = (phase * classes_PQ.shape[1]).add_(source)
                used = UsedRows(is_own.unflatten(1, (-1, w)).any(2).any(0))
                feat_QC = used.of(feat_rwC).flatten(0, 1)
                if not used.are_all:
                    source = used.place(source // w) * w + source % w
                work.add(j, len(phase), packed.flops(len(feat_QC), len(phase)))
                table = torch.cat([packed.lr_part(feat_QC), tables[j]])
                summands_Q2 = torch.stack([source, phase.add_(len(feat_QC))], dim=1)
                for part in _chunks(len(target), self.chunk_px):
                    count = part.stop - part.start
                    x_QD = sums_of_rows(table, self._padded(summands_Q2[part], packed))
                    y_3Q = packed.finish(x_QD)[:, :count]
                    residual_3Q.index_copy_(1, target[part], y_3Q.float())
            residual_3SSrw = (residual_3Q * std).view(3, scale, scale, -1, w)
            sr_3hSwS[:, rows].add_(residual_3SSrw.permute(0, 3, 1, 4, 2))

    def _add_any(
        self,
        sr_3HW: Tensor,
        feat_hwC: Tensor,
        grid: PixelGrid,
        classes_HW: Tensor,
        work: "_Work",
    ) -> None:
        tables = [packed.axes(grid) for packed in self.upsamplers]
        std = self.norm.std.view(3, 1)
        W, w = grid.cols.out_len, grid.cols.lr_len
        for first, last, lr_rows in out_strips(grid, self.block_px):
            feat_rwC = feat_hwC[lr_rows]
            nearest = grid.rows.nearest[first:last] - lr_rows.start
            chosen = classes_HW[first:last].flatten()
            residual_3Q = sr_3HW.new_empty(3, len(chosen))
            is_light = chosen.unflatten(0, (-1, W)) == 0
            lights = int(is_light.sum())
            if lights:
                lightest, (rows_HD, cols_WD) = self.upsamplers[0], tables[0]
                used = UsedRows.at(nearest[is_light.any(1)], len(feat_rwC))
                # All output rows of an LR row, or none.
                lit = UsedRows(used.is_used[nearest])
                lr_rwD = lightest.lr_part(used.of(feat_rwC))[used.place(lit.of(nearest))]
                y_3Q = _all_pixels(lightest, lr_rwD, lit.of(rows_HD[first:last]), cols_WD, grid)
                residual_3Q = lit.put(
                    y_3Q.float().unflatten(1, (-1, W)), residual_3Q.unflatten(1, (-1, W)), 1
                ).flatten(1)
                work.add(0, lights, lightest.flops(used.count * w, y_3Q.shape[1]))
            for j, packed in enumerate(self.upsamplers[1:], start=1):
                picked = (chosen == j).nonzero()[:, 0]
                if len(picked) == 0:
                    continue
                row, col = picked // W + first, picked % W
                lr_row = grid.rows.nearest[row] - lr_rows.start
                used = UsedRows.at(lr_row, len(feat_rwC))
                feat_QC = used.of(feat_rwC).flatten(0, 1)
                source = used.place(lr_row) * w + grid.cols.nearest[col]
                work.add(j, len(picked), packed.flops(len(feat_QC), len(picked)))
                rows_HD, cols_WD = tables[j]
                lr_QD = packed.lr_part(feat_QC)
                x_QD = lr_QD.index_select(0, self._padded(source, packed))
                inside = x_QD[: len(picked)]
                inside.add_(rows_HD.index_select(0, row)).add_(cols_WD.index_select(0, col))
                y_3Q = packed.finish(x_QD)[:, : len(picked)]
                residual_3Q.index_copy_(1, picked, y_3Q.float())
            residual_3rW = (residual_3Q * std).unflatten(1, (last - first, W))
            sr_3HW[:, first:last].add_(residual_3rW)

    def _all_phases(self, packed: PackedSampler, feat_QC: Tensor, phases_PD: Tensor) -> Tensor:
        """All output pixels of some LR pixels at an integer scale, phase by phase: (O, P Q)."""
        lr_QD = packed.lr_part(feat_QC)
        # A narrow one's activations fit the cache at more pixels.
        most = self.chunk_px * max(1, CHUNK_WIDTH // lr_QD.shape[1])
        parts = [
            packed.finish((lr_QD + some_PD[:, None]).flatten(0, 1))
            for some_PD in phases_PD.split(max(1, most // len(lr_QD)))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    def _padded(index: Tensor, packed: PackedSampler) -> Tensor:
        """`index` (Q, ...), for products in half precision with zeros up to a multiple.

        Half-precision products on a CPU are prepared anew for every number of rows, which takes
        longer than the product (measured: 0.35 us a pixel, the product 0.1 to 0.2).
        """
        if packed.feature_CD.dtype == torch.float32 or index.device.type != "cpu":
            return index
        missing = -len(index) % HALF_MULTIPLE
        return torch.cat([index, index.new_zeros(missing, *index.shape[1:])])


def _chunk_px(device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cpu":
        return DEVICE_CHUNK_PX
    return CHUNK_PX * torch.get_num_threads() * (1 if dtype == torch.float32 else 2)


def _all_pixels(
    packed: PackedSampler, lr_rwD: Tensor, rows_rD: Tensor, cols_WD: Tensor, grid: PixelGrid
) -> Tensor:
    """All pixels of r output rows: (O, r W).

    Args:
        lr_rwD: the nearest LR rows' part of the first layer.
        rows_rD, cols_WD: the positions' part.
    """
    x_rWD = lr_rwD[:, grid.cols.nearest] + rows_rD[:, None] + cols_WD
    return packed.finish(x_rWD.flatten(0, 1))


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


def _chunks(count: int, most: int) -> Iterator[slice]:
    """Consecutive slices of `most`, up to `count`."""
    for start in range(0, count, most):
        yield slice(start, min(count, start + most))
