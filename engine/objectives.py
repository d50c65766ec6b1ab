"""What training minimises: modules that turn samples into losses.

Every loss is a mean over the samples given, or (phase 1's load) a value that all micro-batches of
all ranks share, so that the mean over micro-batches is the loss of the whole batch.
Axes: B batch, h w LR, H W output, M upsamplers.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from engine.microbatches import differentiable_sum_over_batch, sum_over_batch
from models.pcsr import PCSR


class ReconstructionObjective(nn.Module):
    """L1 between output and HR: original networks and PCSR's phase 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

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
        return {"loss": F.l1_loss(sr.float(), hr)}


class RoutingObjective(nn.Module):
    """Phase 1: the mixture's L1, and the average load of each upsampler near N / M.

    ``loss_rgb_w L1(sum_j p_j y_j, hr) + loss_avg_w mean_j |sum p_j - N/M| / (N/M)``, the sums over
    all N pixels of the whole batch. (For M = 2 both terms of the mean are equal: the published
    loss.)
    """

    def __init__(self, model: PCSR, *, loss_rgb_w: float, loss_avg_w: float) -> None:
        super().__init__()
        self.model = model
        self.loss_rgb_w = loss_rgb_w
        self.loss_avg_w = loss_avg_w

    def forward(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Takes the same as :class:`ReconstructionObjective`.

        Returns:
            ``{"loss", "loss_rgb", "loss_avg", "heavy_share"}``, scalars.
        """
        sr, probs_BMHW = self.model.mixture(lr, (hr.shape[-2], hr.shape[-1]))
        loss_rgb = F.l1_loss(sr.float(), hr)
        load_M = differentiable_sum_over_batch(probs_BMHW.sum(dim=(0, 2, 3)))
        pixels = load_M.new_tensor(float(probs_BMHW[:, 0].numel()))
        target = sum_over_batch(pixels) / len(load_M)
        loss_avg = ((load_M - target).abs() / target).mean()
        return {
            "loss": self.loss_rgb_w * loss_rgb + self.loss_avg_w * loss_avg,
            "loss_rgb": loss_rgb,
            "loss_avg": loss_avg,
            "heavy_share": probs_BMHW[:, -1].mean(),
        }


def make_objective(
    model: nn.Module, *, loss_rgb_w: float, loss_avg_w: float
) -> ReconstructionObjective | RoutingObjective:
    """The objective that fits `model`: routing where there is a classifier."""
    if isinstance(model, PCSR) and model.classifier is not None:
        return RoutingObjective(model, loss_rgb_w=loss_rgb_w, loss_avg_w=loss_avg_w)
    return ReconstructionObjective(model)
