"""The engine for CPUs: :class:`FastEngine` with classifier and upsamplers as compiled kernels.

A segment of an LR row is one task: classifier, or upsamplers on the pixels of their class, from
the features to the sum with the bilinear LR, without an array in between (`models.native`).

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models import native
from models.cost import UpsamplingCost
from models.fast import HALF_MIN_WIDTH, FastEngine
from models.grid import PixelGrid
from models.inference import Upsampled
from models.native.bindings import Library, Skip
from models.native.mlp import NativeMLP
from models.pcsr import PCSR
from models.routing import relative_to_lightest
from models.sampler import LIIFSampler
from models.streams import Encoder
from utils.errors import UserError

# LR pixels of a run of rows. Kernels choose by themselves what fits the cache, and a large run
# costs less per pixel (measured: 16384 take a tenth longer); one of 52 channels takes 14 MB.
RUN_PX = 65536


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
        encoder = encoder or native.fused_encoder(model.encoder, dtype)
        super().__init__(model, run_px=run_px or RUN_PX, dtype=dtype, encoder=encoder)
        self._library = library
        self._tolerance = native.TOLERANCE
        half = dtype == torch.bfloat16 and library.has_half
        # The lightest of several runs on all pixels of a row, which is not made for half precision.
        self._upsamplers = [
            NativeMLP.pack(
                sampler,
                library.tile,
                half=half and _is_wide(sampler) and (index > 0 or len(model.upsamplers) == 1),
            )
            for index, sampler in enumerate(model.upsamplers)
        ]
        if any(mlp.half_layers for mlp in self._upsamplers):
            self._tolerance = native.HALF_TOLERANCE
        self._classifier = None
        if model.classifier is not None:
            self._classifier = NativeMLP.pack(model.classifier, library.tile, margins=True)
        self._gain = self.norm.std.detach().flatten().float().clone()
        self._check(model)

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        """See `models.inference.Engine`."""
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
        """See `models.inference.Engine`."""
        mlp = self._classifier
        if mlp is None:
            return super().classify(feat_BChw, grid)
        shape = (len(feat_BChw), mlp.out_dim, *grid.out_size)
        margins_BKHW = torch.empty(shape, dtype=torch.float32)
        return margins_BKHW, self._library.apply([mlp], feat_BChw.float(), grid, margins_BKHW)

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        """See `models.inference.Engine`."""
        sr = torch.empty(len(feat_BChw), 3, *grid.out_size, dtype=torch.float32)
        skip = Skip(lr.float().contiguous(), classes_BHW.contiguous(), self._gain)
        flops = self._library.apply(self._upsamplers, feat_BChw.float(), grid, sr, skip=skip)
        # Ten times as fast as torch, which counts bytes as 64-bit numbers.
        classes = classes_BHW.numpy()
        counts = [int(np.count_nonzero(classes == j)) for j in range(1, len(self._upsamplers))]
        return Upsampled(sr, [classes_BHW.numel() - sum(counts), *counts], flops)

    @torch.inference_mode()
    def _check(self, model: PCSR) -> None:
        """Compare with the model itself, at random features and with all classes.

        A row is several groups of pixels and a rest.
        """
        h, w = 2, 2 * self._library.group + 3
        generator = torch.Generator().manual_seed(0)
        feat = torch.randn(1, model.encoder.out_dim, h, w, generator=generator)
        lr = torch.rand(1, 3, h, w, generator=generator)
        for size in ((2 * h, 2 * w), (3, w + 5)):
            grid = PixelGrid.build((h, w), size)
            classes = torch.randint(len(self._upsamplers), (1, *size), generator=generator)
            residual = torch.zeros(1, 3, *size)
            for j, sampler in enumerate(model.upsamplers):
                residual = sampler.dense(feat, grid).where(classes[:, None] == j, residual)
            theirs = [residual * self.norm.std + grid.bilinear(lr)]
            ours = [self.upsample(lr, feat, grid, classes.to(torch.uint8)).sr]
            if model.classifier is not None:
                theirs.append(relative_to_lightest(model.classifier.dense(feat, grid)))
                ours.append(self.classify(feat, grid)[0])
            for what, one, other in zip(("images", "margins"), ours, theirs, strict=False):
                same_nan = torch.equal(one.isnan(), other.isnan())
                one, other = one.nan_to_num(), other.nan_to_num()
                if not (same_nan and (one - other).norm() <= self._tolerance * other.norm()):
                    raise UserError(f"CPU kernels: their {what} are wrong")


def _is_wide(sampler: LIIFSampler) -> bool:
    """Whether an MLP gains by half precision more than rounding its activations costs."""
    return max(layer.out_features for layer in sampler.imnet.linears) >= HALF_MIN_WIDTH
