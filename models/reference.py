"""The reference engine: straightforward, pixel by pixel, the oracle for faster ones.

Axes: B batch, C channels, h w LR, H W output, M upsamplers, Q pixels.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from models.cost import UpsamplingCost
from models.grid import PixelGrid
from models.inference import Upsampled
from models.pcsr import PCSR
from models.routing import relative_to_lightest
from utils.flops import mlp_flops

PIXEL_BATCH_SIZE = 300_000
# Measured with CARN on a CPU: three quarters of the time. Larger activations are given back to the
# system and asked for again, page by page, in every layer.
_MOST_ON_CPU = 65_536


class ReferenceEngine:
    """Runs a PCSR model as its definition reads.

    Args:
        model: in eval mode, on its device.
        pixel_batch_size: at most this many pixels go through an MLP at once.
    """

    def __init__(self, model: PCSR, *, pixel_batch_size: int = PIXEL_BATCH_SIZE) -> None:
        self.model = model
        self.dtype = torch.float32
        on_cpu = model.norm.mean.device.type == "cpu"
        self.pixel_batch_size = min(pixel_batch_size, _MOST_ON_CPU) if on_cpu else pixel_batch_size

    def encode(self, lr: Tensor) -> Tensor:
        """See `models.inference.Engine`."""
        # Pixel by pixel in memory, once: every part of the pixels would have it so for itself.
        return self.model.encode(lr).contiguous(memory_format=torch.channels_last)

    def encode_rows(self, lr: Tensor) -> Iterator[Tensor]:
        """See `models.inference.Engine`."""
        yield self.encode(lr)

    def run_rows(self, lr_size: tuple[int, int]) -> list[int]:
        """See `models.inference.Engine`."""
        return [lr_size[0]]

    def cost(self, grid: PixelGrid, run_rows: Sequence[int]) -> UpsamplingCost:
        """See `models.inference.Engine`."""
        (H, W), classifier = grid.out_size, self.model.classifier
        upsamplers = self.model.upsamplers
        return UpsamplingCost(
            fixed=0 if classifier is None else H * W * mlp_flops(classifier),
            pixel=tuple(mlp_flops(upsampler) for upsampler in upsamplers),
            strip_starts=(0,),
            strip=np.zeros((1, len(upsamplers))),
        )

    def classify(self, feat_BChw: Tensor, grid: PixelGrid) -> tuple[Tensor, int]:
        """See `models.inference.Engine`."""
        (H, W), batch = grid.out_size, len(feat_BChw)
        classifier = self.model.classifier
        if classifier is None:
            return feat_BChw.new_zeros(batch, 0, H, W), 0
        pixels = torch.arange(H * W, device=feat_BChw.device)
        parts = pixels.split(max(1, self.pixel_batch_size // batch))
        logits_BQM = torch.cat([classifier(feat_BChw, grid, part) for part in parts], dim=1)
        logits_BMHW = logits_BQM.transpose(1, 2).unflatten(2, (H, W))
        return relative_to_lightest(logits_BMHW), batch * H * W * mlp_flops(classifier)

    def upsample(
        self, lr: Tensor, feat_BChw: Tensor, grid: PixelGrid, classes_BHW: Tensor
    ) -> Upsampled:
        """See `models.inference.Engine`."""
        residual_BQ3 = feat_BChw.new_zeros(*classes_BHW.flatten(1).shape, 3)
        counts, flops = [], 0
        for index, upsampler in enumerate(self.model.upsamplers):
            count = 0
            for image, classes_Q in enumerate(classes_BHW.flatten(1)):
                chosen = (classes_Q == index).nonzero()[:, 0]
                count += len(chosen)
                feat = feat_BChw[image : image + 1]
                for part in chosen.split(self.pixel_batch_size):
                    residual_BQ3[image, part] = upsampler(feat, grid, part)[0]
            counts.append(count)
            flops += count * mlp_flops(upsampler)
        residual_B3HW = residual_BQ3.transpose(1, 2).unflatten(2, grid.out_size)
        sr = residual_B3HW * self.model.norm.std + grid.bilinear(lr)
        return Upsampled(sr, counts, flops)
