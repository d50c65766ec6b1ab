"""How far an output is from what it should be: L1, or L2 from some iteration on."""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)


class PixelLoss(nn.Module):
    """The mean absolute difference, as published, or at last the mean squared one.

    PSNR is a matter of squared errors: least on average at the mean of what HR can be, where L1's
    optimum is the median. L1 gets close faster, so L2 is for the end of a run.

    Args:
        l2_from: the first iteration, from 0, with L2; None for L1 always.
    """

    _l2_share: Tensor

    def __init__(self, l2_from: int | None = None) -> None:
        super().__init__()
        self.l2_from = l2_from
        # On the device: what a CUDA graph has recorded can still be switched.
        self.register_buffer("_l2_share", torch.zeros(()), persistent=False)

    def set_step(self, step: int) -> None:
        """Say which iteration, from 0, comes next."""
        if self.l2_from is not None:
            self._l2_share.fill_(step >= self.l2_from)
        if step == self.l2_from:
            logger.info("iteration %d: from here on, pixels are compared by L2", step)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar: the mean over all values of two tensors of one shape, in float32 or wider."""
        if output.dtype in (torch.bfloat16, torch.float16):
            output = output.float()
        if self.l2_from is None:
            return F.l1_loss(output, target)
        l1, l2 = F.l1_loss(output, target), F.mse_loss(output, target)
        return torch.lerp(l1, l2, self._l2_share.to(l1.dtype))
