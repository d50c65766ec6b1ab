"""What training minimises: modules that turn samples into losses.

Every loss is a mean over the samples given, or (phase 1's load) a value that all micro-batches of
all ranks share, so that the mean over micro-batches is the loss of the whole batch.
Axes: B batch, h w LR, H W output.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from engine.pixel_loss import PixelLoss
from engine.routing_losses import ROUTING_LOSSES
from models.pcsr import PCSR
from utils.errors import UserError


class ReconstructionObjective(nn.Module):
    """The pixel loss between output and HR: original networks and PCSR's phase 0."""

    def __init__(self, model: nn.Module, pixel_loss: PixelLoss) -> None:
        super().__init__()
        self.model = model
        self.pixel_loss = pixel_loss

    def forward(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Losses of some samples.

        Args:
            lr: (B, 3, h, w) float RGB in [0, 1].
            hr: (B, 3, H, W).

        Returns:
            ``{"loss"}``, a scalar.
        """
        if isinstance(self.model, PCSR):
            sr = self.model(lr, (hr.shape[-2], hr.shape[-1]))
        else:
            sr = self.model(lr)
        return {"loss": self.pixel_loss(sr, hr)}


def make_objective(
    model: nn.Module,
    *,
    loss_rgb_w: float,
    loss_avg_w: float,
    routing_loss: Mapping[str, Any] | None = None,
    pixel_loss: PixelLoss | None = None,
) -> nn.Module:
    """The objective that fits `model`: routing where there is a classifier.

    Args:
        routing_loss: spec of the routing's loss, see `engine.routing_losses`; default the
            published one.
        pixel_loss: how outputs are compared with what they should be; default L1.

    Raises:
        UserError: a wrong spec, or one for a model without a classifier.
    """
    pixel_loss = pixel_loss or PixelLoss()
    if isinstance(model, PCSR) and model.classifier is not None:
        spec = routing_loss or {"name": "average"}
        return ROUTING_LOSSES.make(
            spec,
            "routing_loss",
            model=model,
            pixel_loss=pixel_loss,
            loss_rgb_w=loss_rgb_w,
            loss_avg_w=loss_avg_w,
        )
    if routing_loss is not None:
        raise UserError("config: `routing_loss` goes with `phase: 1`: this model has no classifier")
    return ReconstructionObjective(model, pixel_loss)
