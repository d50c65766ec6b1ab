"""Original networks with the graph optimisations that PCSR's fast engine has: a fair baseline."""

import torch
from torch import Tensor

from models import kernels, native
from models.backbones.base import SRNetwork
from models.fuse import fused_copy


class OptimizedOriginal:
    """Batch norm folded, convolutions channels-last, features by the same kernels as PCSR's.

    Args:
        model: an original network in eval mode, on its device; it is left as it is.
        dtype: of weights and activations; images stay float32.
    """

    def __init__(self, model: SRNetwork, dtype: torch.dtype = torch.float32) -> None:
        self.norm = model.norm
        self.dtype = dtype
        fused_encoder = (kernels if self.norm.mean.is_cuda else native).fused_encoder
        self.features = fused_encoder(model, dtype)
        self.tail = fused_copy(model).to(dtype)

    @torch.inference_mode()
    def __call__(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) float RGB in [0, 1] to (B, 3, scale h, scale w), not clamped."""
        x = self.norm.normalise(lr).contiguous(memory_format=torch.channels_last)
        feat = self.features(x.to(self.features.input_dtype))
        feat = feat.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.norm.denormalise(self.tail.reconstruct(feat, x.to(self.dtype)).float())
