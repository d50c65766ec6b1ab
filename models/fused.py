"""The engine for CUDA GPUs: :class:`FastEngine` with classifier and upsamplers as fused kernels.

Each of them is one product at LR resolution and one kernel for the rest (`models.kernels`), over
all pixels at once, or over those of its class. The host never waits for the device but to say, at
the end, how many pixels each class had; by then everything is queued.

Needs Triton: import this module where `models.kernels.available` says so.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, K = M - 1 margins.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models import kernels
from models.cost import UpsamplingCost
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Upsampled
from models.kernels.partition import Partition
from models.kernels.pixel_mlp import ClassPixels, Skip, apply_mlp, largest_piece
from models.kernels.weights import KernelMLP
from models.pcsr import PCSR
from models.sampler import LIIFSampler
from models.streams import Encoder
from utils.cli import one_line
from utils.errors import UserError

# How far the kernels may be from plain torch, relative to it.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}

# LR pixels of an encoder's run of rows: enough to fill a GPU; images of up to twice as many
# (1920x1080) are one run. A run's largest tensors are the first layers' sums: 0.4 GB each at a
# width of 192 in float32.
RUN_PX = 2**20
# The least rows of a run, in radii of the backbone: what runs share is computed twice.
_LEAST_RADII = 8


class FusedEngine(FastEngine):
    """A PCSR model packed for inference on a CUDA GPU; the model is left as it is.

    The constructor compiles the kernels and compares them with plain torch on a small image, so
    that a GPU or a Triton with which they fail is found before it matters.

    Args:
        model: in eval mode, on its device.
        run_px: LR pixels that go through the encoder at once.
        dtype: of convolutions and products: float32, bfloat16 or float16. Images, margins,
            geometry and sums are float32. So are float32 products up to rounding: matrix units
            compute them in three parts of tf32.
        encoder: see :class:`FastEngine`; by default, too, it is of fused kernels.

    Raises:
        UserError: the kernels do not run on the model's device, or not correctly.
    """

    def __init__(
        self,
        model: PCSR,
        *,
        run_px: int = RUN_PX,
        dtype: torch.dtype = torch.float32,
        encoder: Encoder | None = None,
    ) -> None:
        device = model.norm.mean.device
        reason = kernels.why_unavailable(device)
        if reason is not None:
            raise UserError(f"fused kernels on device `{device}`: {reason}")
        encoder = encoder or kernels.fused_encoder(model.encoder, dtype)
        super().__init__(model, run_px=run_px, dtype=dtype, encoder=encoder)

        def pack(sampler: LIIFSampler, margins: bool = False) -> KernelMLP:
            width = max(layer.out_features for layer in sampler.imnet.linears)
            piece = largest_piece(dtype, device, width)
            return KernelMLP.pack(sampler, dtype, largest_piece=piece, margins=margins)

        self.upsampler_mlps = [pack(sampler) for sampler in model.upsamplers]
        self.classifier_mlp = None
        if model.classifier is not None:
            self.classifier_mlp = pack(model.classifier, margins=True)
        self._check(model.encoder.out_dim, device)

    def _pushed_rows(self, h: int, w: int) -> int:
        return min(h, max(super()._pushed_rows(h, w), _LEAST_RADII * self.lag_rows))

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        """See `models.inference.Engine`."""
        lr_pixels = grid.rows.lr_len * grid.cols.lr_len
        H, W = grid.out_size
        fixed = sum(mlp.flops(lr_pixels, 0) for mlp in self.upsampler_mlps)
        if self.classifier_mlp is not None:
            fixed += self.classifier_mlp.flops(lr_pixels, H * W)
        return UpsamplingCost(
            fixed=fixed,
            pixel=tuple(mlp.flops(0, 1) for mlp in self.upsampler_mlps),
            strip_starts=(0,),
            strip=np.zeros((1, len(self.upsampler_mlps))),
        )

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        """See `models.inference.Engine`."""
        mlp = self.classifier_mlp
        if mlp is None:
            return super().classify(feat_BChw, grid)
        (H, W), (batch, _, h, w) = grid.out_size, feat_BChw.shape
        margins_BKHW = feat_BChw.new_empty(batch, mlp.out_dim, H, W, dtype=torch.float32)
        apply_mlp(mlp, feat_BChw, grid, margins_BKHW)
        return margins_BKHW, mlp.flops(batch * h * w, batch * H * W)

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        """See `models.inference.Engine`."""
        (H, W), (batch, _, h, w) = grid.out_size, feat_BChw.shape
        sr = lr.new_empty(batch, 3, H, W, dtype=torch.float32)
        skip = Skip(lr.float().contiguous(), self.norm.std.flatten())
        if len(self.upsampler_mlps) == 1:
            apply_mlp(self.upsampler_mlps[0], feat_BChw, grid, sr, skip=skip)
            counts = [batch * H * W]
        else:
            partition = Partition.of(classes_BHW, len(self.upsampler_mlps))
            for j, mlp in enumerate(self.upsampler_mlps):
                apply_mlp(mlp, feat_BChw, grid, sr, only=ClassPixels(partition, j), skip=skip)
            counts = partition.counts()
        flops = sum(
            mlp.flops(batch * h * w, count)
            for mlp, count in zip(self.upsampler_mlps, counts, strict=True)
        )
        return Upsampled(sr, counts, flops)

    @torch.inference_mode()
    def _check(self, channels: int, device: torch.device) -> None:
        """Compare with plain torch, at random features and with all classes."""
        generator = torch.Generator().manual_seed(0)
        feat = torch.randn(1, channels, 6, 5, generator=generator).to(device, self.dtype)
        lr = torch.rand(1, 3, 6, 5, generator=generator).to(device)
        grid = PixelGrid.build((6, 5), (12, 10), device)
        classes = torch.arange(12 * 10, device=device) % len(self.upsampler_mlps)
        classes = classes.to(torch.uint8).view(1, 12, 10)
        skip = grid.bilinear(lr)
        try:
            margins = self.classify(feat, grid)[0]
            residual = self.upsample(lr, feat, grid, classes).sr - skip
        except Exception as error:
            raise UserError(f"fused kernels on device `{device}`: {one_line(error)}") from error
        expected = super().classify(feat, grid)[0]
        expected_residual = super().upsample(lr, feat, grid, classes).sr - skip
        for what, ours, theirs in (
            ("margins", margins, expected),
            ("residuals", residual, expected_residual),
        ):
            # What is subtracted leaves its rounding; and NaN must not pass.
            limit = _TOLERANCE[self.dtype] * theirs.norm() + 1e-6 * skip.norm()
            if not bool((ours - theirs).norm() <= limit):
                raise UserError(f"fused kernels on device `{device}`: their {what} are wrong")
