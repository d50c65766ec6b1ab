"""How far an output is from what it should be: L1, and L2 or PSNR from some iteration on."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of PSNR: an image's mean squared error, of values in [0, 1], counts as so much more. Without it
# flat patches, which are restored at 50 dB and above, would be most of the gradient.
FLOOR = 1e-4

logger = logging.getLogger(__name__)


def negative_psnr(output: Tensor, target: Tensor) -> Tensor:
    """Minus the mean of the images' PSNR, ``10 log10(MSE + FLOOR)``, in dB: a scalar.

    An image's gradient is that of its L2 over the L2: all images count about the same, as they do
    in a mean PSNR, where L2 is for the most part a matter of those that are restored worst.

    Args:
        output: (B, ...) float, an image for each index of the first dimension.
        target: the same shape, in [0, 1].
    """
    mse_B = (output - target).square().flatten(1).mean(dim=1)
    return 10 * (mse_B + FLOOR).log10().mean()


class _Stage(NamedTuple):
    start: int
    key: str
    name: str
    loss: Callable[[Tensor, Tensor], Tensor]


class PixelLoss(nn.Module):
    """The mean absolute difference, as published, the mean squared one, or minus the mean PSNR.

    PSNR is a matter of squared errors. They are least on average at the mean of what HR can be;
    absolute ones are at its median.

    Args:
        l2_from: the first iteration, from 0, with L2; None for never.
        psnr_from: likewise with :func:`negative_psnr`. Of both, what began last is in effect.

    Attributes:
        stages: one after the other.
        changes: the iterations in which another than before begins.
    """

    _stage: Tensor

    def __init__(self, l2_from: int | None = None, psnr_from: int | None = None) -> None:
        super().__init__()
        later = []
        if l2_from is not None:
            later.append(_Stage(l2_from, "l2_from", "L2", F.mse_loss))
        if psnr_from is not None:
            later.append(_Stage(psnr_from, "psnr_from", "PSNR", negative_psnr))
        later.sort(key=lambda stage: stage.start)
        # L1 is not computed where it is never in effect.
        first = [] if later and later[0].start == 0 else [_Stage(0, "", "L1", F.l1_loss)]
        self.stages = [*first, *later]
        self.changes = {stage.start for stage in self.stages[1:]}
        self._current = 0
        self._announced = ""
        # The same on the device: what a CUDA graph has recorded can still be switched.
        self.register_buffer("_stage", torch.zeros(1, dtype=torch.long), persistent=False)

    def set_step(self, step: int) -> None:
        """Say which iteration, from 0, comes next."""
        current = max(i for i, stage in enumerate(self.stages) if stage.start <= step)
        if current != self._current:
            self._current = current
            self._stage.fill_(current)
        stage = self.stages[current]
        if stage.key != self._announced:
            self._announced = stage.key
            logger.info(
                "iteration %d: pixels are compared by %s (`%s: %d`)",
                step,
                stage.name,
                stage.key,
                stage.start,
            )

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar of two tensors of one shape, (B, ...), in float32 or wider."""
        output, target = (x if x.dtype == torch.float64 else x.float() for x in (output, target))
        losses = [stage.loss(output, target) for stage in self.stages]
        if len(losses) == 1:
            return losses[0]
        return torch.stack(losses).index_select(0, self._stage).squeeze(0)
