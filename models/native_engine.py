"""The engine for CPUs: :class:`FastEngine` with classifier and upsamplers as compiled kernels.

Each LR row is one task: classifier, or upsamplers on the pixels of their class, from the features
to the sum with the bilinear LR, without an array in between (`models.native`).

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.cost import UpsamplingCost
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Upsampled
from models.native.bindings import Library, NativeMLP
from models.pcsr import PCSR
from models.streams import Encoder
from utils.errors import UserError

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class NativeEngine(FastEngine):
    """A PCSR model packed for inference on a CPU; the model is left as it is.

    The constructor compares the kernels with plain torch on a small image, so that a compiler or a
    processor with which they fail is found before it matters.

    Args:
        library: the compiled kernels.
        model: in eval mode, on the CPU.
        run_px: LR pixels that go through the encoder at once.
        dtype: of the encoder; the kernels compute in float32 whatever it is.
        encoder: see :class:`FastEngine`.

    Raises:
        UserError: the kernels give other results than plain torch.
    """

    def __init__(
        self,
        library: Library,
        model: PCSR,
        *,
        run_px: int | None = None,
        dtype: torch.dtype = torch.float32,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__(model, run_px=run_px, dtype=dtype, encoder=encoder)
        self._library = library
        self._upsamplers = [NativeMLP.pack(s, library.tile) for s in model.upsamplers]
        self._classifier = None
        if model.classifier is not None:
            self._classifier = NativeMLP.pack(model.classifier, library.tile, margins=True)
        self._gain = self.norm.std.flatten().float().contiguous()
        self._check(model.encoder.out_dim)

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        w, (H, W) = grid.cols.lr_len, grid.out_size
        # A strip is what one LR row gives; at scales below 1 some give nothing.
        starts = np.unique(grid.rows.nearest.numpy(), return_index=True)[1]
        strip = np.array([[mlp.flops(w, 0) for mlp in self._upsamplers]] * len(starts), np.float64)
        pixel = [mlp.flops(0, 1) for mlp in self._upsamplers]
        if grid.integer_scale is not None:
            # The lightest runs on all pixels of a strip where one is its own.
            strip[:, 0] += np.diff([*starts, H]) * W * pixel[0]
            pixel[0] = 0
        classifier = self._classifier
        return UpsamplingCost(
            fixed=0 if classifier is None else classifier.flops(w * len(starts), H * W),
            pixel=tuple(pixel),
            strip_starts=tuple(int(start) for start in starts),
            strip=strip,
        )

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        mlp = self._classifier
        if mlp is None:
            return super().classify(feat_BChw, grid)
        margins_BKHW = torch.empty(len(feat_BChw), mlp.out_dim, *grid.out_size)
        flops = sum(
            self._library.apply([mlp], feat_hwC, grid, margins_KHW)
            for feat_hwC, margins_KHW in zip(_rows_of(feat_BChw), margins_BKHW, strict=True)
        )
        return margins_BKHW, flops

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        sr = grid.bilinear(lr)
        flops = sum(
            self._library.apply(
                self._upsamplers,
                feat_hwC,
                grid,
                sr_3HW,
                classes_HW=classes_HW.contiguous(),
                gain_O=self._gain,
            )
            for feat_hwC, sr_3HW, classes_HW in zip(
                _rows_of(feat_BChw), sr, classes_BHW, strict=True
            )
        )
        counts = [int((classes_BHW == j).sum()) for j in range(1, len(self._upsamplers))]
        return Upsampled(sr, [classes_BHW.numel() - sum(counts), *counts], flops)

    @torch.inference_mode()
    def _check(self, channels: int) -> None:
        """Compare with plain torch, at random features and with all classes."""
        generator = torch.Generator().manual_seed(0)
        feat = torch.randn(1, channels, 6, 5, generator=generator)
        lr = torch.rand(1, 3, 6, 5, generator=generator)
        for size in ((12, 10), (9, 13)):
            grid = PixelGrid.build((6, 5), size)
            classes = torch.arange(size[0] * size[1]) % len(self._upsamplers)
            classes = classes.to(torch.uint8).view(1, *size)
            skip = grid.bilinear(lr)
            ours = self.classify(feat, grid)[0], self.upsample(lr, feat, grid, classes).sr - skip
            theirs = (
                super().classify(feat, grid)[0],
                super().upsample(lr, feat, grid, classes).sr - skip,
            )
            for what, one, other in zip(("margins", "residuals"), ours, theirs, strict=True):
                # What is subtracted leaves its rounding; and NaN must not pass.
                limit = _TOLERANCE[self.dtype] * other.norm() + 1e-6 * skip.norm()
                if not bool((one - other).norm() <= limit):
                    raise UserError(f"CPU kernels: their {what} are wrong")


def _rows_of(feat_BChw: Tensor) -> Tensor:
    """(B, h, w, C) float32, contiguous; a view where the features are that in memory."""
    return feat_BChw.permute(0, 2, 3, 1).float().contiguous()
