"""How far an output is from what it should be: L1, or L2 from some iteration on."""

import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)


class PixelLoss(nn.Module):
    """The mean absolute difference, as published, or the mean squared one.

    PSNR is a matter of squared errors. They are least on average at the mean of what HR can be;
    absolute ones are at its median.

    Args:
        l2_from: the first iteration, from 0, with L2; None for L1 always.
    """

    _is_l2: Tensor

    def __init__(self, l2_from: int | None = None) -> None:
        super().__init__()
        self.l2_from = l2_from
        self._has_switched = False
        # The same on the device: what a CUDA graph has recorded can still be switched.
        self.register_buffer("_is_l2", torch.zeros((), dtype=torch.bool), persistent=False)

    def set_step(self, step: int) -> None:
        """Say which iteration, from 0, comes next."""
        is_l2 = self.l2_from is not None and step >= self.l2_from
        if is_l2 == self._has_switched:
            return
        self._has_switched = is_l2
        self._is_l2.fill_(is_l2)
        if is_l2:
            logger.info(
                "iteration %d: pixels are compared by L2 (`l2_from: %d`)", step, self.l2_from
            )

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar: the mean over all values of two tensors of one shape, in float32 or wider."""
        output, target = (x if x.dtype == torch.float64 else x.float() for x in (output, target))
        l1 = F.l1_loss(output, target)
        if self.l2_from is None:
            return l1
        return torch.where(self._is_l2, F.mse_loss(output, target), l1)
