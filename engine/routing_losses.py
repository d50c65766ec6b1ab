"""What phase 1 minimises, by the name that a config gives: ``routing_loss: {name, args}``.

The published loss, `average`, trains light upsamplers and classifier on their mixture. The others
train them apart: each light upsampler learns all pixels, and the margins, the logits relative to
the lightest's, learn the *gain*: how much closer than the lightest an upsampler comes.

Where the heaviest upsampler y_H is right on average, y_H = E[hr | features], the expected fall of
the squared error,

    E[(y_0 - hr)^2 - (y_j - hr)^2] = (y_0 - y_H)^2 - (y_j - y_H)^2,

holds no HR. So y_H can stand in for HR, in the gain and as what light upsamplers learn, without
the noise of a pixel's error.

Axes: B batch, h w LR, H W output, M upsamplers, K = M - 1, Q pixels of an image.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.microbatches import differentiable_sum_over_batch, sum_over_batch
from engine.pixel_loss import PixelLoss
from models.pcsr import PCSR
from models.routing import relative_to_lightest
from utils.registry import Registry

ROUTING_LOSSES = Registry("routing loss")

_LEVELS = 255.0
# Pixels of an image are compared with those that these shares of it further on, in rows.
_PARTNERS = (0.13, 0.29, 0.47)


@ROUTING_LOSSES.register("average")
class RoutingObjective(nn.Module):
    """The published loss: the mixture's pixel loss, and each upsampler's average load near N / M.

    ``loss_rgb_w L(sum_j p_j y_j, hr) + loss_avg_w mean_j |sum p_j - N/M| / (N/M)``, the sums over
    all N pixels of the whole batch. (For M = 2 both terms of the mean are equal: the published
    loss.)
    """

    def __init__(
        self, *, model: PCSR, pixel_loss: PixelLoss, loss_rgb_w: float, loss_avg_w: float
    ) -> None:
        super().__init__()
        self.model = model
        self.pixel_loss = pixel_loss
        self.loss_rgb_w = loss_rgb_w
        self.loss_avg_w = loss_avg_w

    def forward(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Losses of some samples.

        Args:
            lr: (B, 3, h, w) float RGB in [0, 1].
            hr: (B, 3, H, W).

        Returns:
            ``{"loss", "loss_rgb", "loss_avg", "heavy_share"}``, scalars.
        """
        sr, probs_BMHW = self.model.mixture(lr, (hr.shape[-2], hr.shape[-1]))
        loss_rgb = self.pixel_loss(sr, hr)
        load_M = differentiable_sum_over_batch(probs_BMHW.sum(dim=(0, 2, 3)))
        # Made on the device: from the host it could not be part of a CUDA graph.
        pixels = load_M.new_full((), float(probs_BMHW[:, 0].numel()))
        target = sum_over_batch(pixels) / len(load_M)
        loss_avg = ((load_M - target).abs() / target).mean()
        return {
            "loss": self.loss_rgb_w * loss_rgb + self.loss_avg_w * loss_avg,
            "loss_rgb": loss_rgb,
            "loss_avg": loss_avg,
            "heavy_share": probs_BMHW[:, -1].mean(),
        }


class _GainObjective(nn.Module):
    """``loss_rgb_w`` times light upsamplers' mean pixel loss, ``loss_avg_w`` times the gain's loss.

    The margins' unit is `threshold`: at k = 0 each step to a heavier upsampler must gain as much.
    A pixel's loss looks at its own image alone, so nothing has to be shared between micro-batches.

    Args:
        target: what light upsamplers learn: "heavy", the heaviest one's output, or "hr".
        reference: what gains are measured against, likewise.
        threshold: in levels of 255, root mean square over RGB.
        smoothing_px: width of the box that a squared gain is averaged over; odd, 1 for none.
    """

    def __init__(
        self,
        *,
        model: PCSR,
        pixel_loss: PixelLoss,
        loss_rgb_w: float,
        loss_avg_w: float,
        target: str = "heavy",
        reference: str = "heavy",
        threshold: float = 1.0,
        smoothing_px: int = 1,
    ) -> None:
        super().__init__()
        for key, value in (("target", target), ("reference", reference)):
            if value not in ("heavy", "hr"):
                raise ValueError(f"`{key}` must be heavy or hr, not {value}")
        if not threshold > 0:
            raise ValueError(f"`threshold` must be above 0, not {threshold:g}")
        if smoothing_px < 1 or smoothing_px % 2 == 0:
            raise ValueError(f"`smoothing_px` must be odd, not {smoothing_px}")
        self.model = model
        self.pixel_loss = pixel_loss
        self.loss_rgb_w = loss_rgb_w
        self.loss_avg_w = loss_avg_w
        self.target = target
        self.reference = reference
        self.threshold = threshold
        self.smoothing_px = smoothing_px

    def forward(self, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        """Takes the same as :class:`RoutingObjective`.

        Returns:
            ``{"loss", "loss_rgb", "loss_gain", "heavy_share"}``, scalars.
        """
        outputs, logits_BMHW = self.model.outputs(lr, (hr.shape[-2], hr.shape[-1]))
        *lights, heavy = (y.float() for y in outputs)
        target = heavy.detach() if self.target == "heavy" else hr
        loss_rgb = torch.stack([self.pixel_loss(light, target) for light in lights]).mean()
        wanted_BKHW = self.wanted_margins([y.detach() for y in (*lights, heavy)], hr)
        loss_gain = self.compare(relative_to_lightest(logits_BMHW), wanted_BKHW)
        is_heavy = logits_BMHW.argmax(dim=1) == logits_BMHW.shape[1] - 1
        return {
            "loss": self.loss_rgb_w * loss_rgb + self.loss_avg_w * loss_gain,
            "loss_rgb": loss_rgb,
            "loss_gain": loss_gain,
            "heavy_share": is_heavy.float().mean(),
        }

    def wanted_margins(self, outputs: list[Tensor], hr: Tensor) -> Tensor:
        """Each heavier upsampler's gain in thresholds, less one per step to it: (B, K, H, W).

        Args:
            outputs: of the upsamplers, light to heavy, each (B, 3, H, W).
            hr: (B, 3, H, W).
        """
        reference = outputs[-1] if self.reference == "heavy" else hr.float()
        errors = [(y - reference).square().mean(dim=1) for y in outputs]
        gains_BKHW = torch.stack([errors[0] - error for error in errors[1:]], dim=1)
        if self.smoothing_px > 1:
            margin = self.smoothing_px // 2
            padded = F.pad(gains_BKHW, [margin] * 4, mode="replicate")
            gains_BKHW = F.avg_pool2d(padded, self.smoothing_px, stride=1)
        levels = gains_BKHW.sign() * gains_BKHW.abs().sqrt() * _LEVELS
        steps_K = torch.arange(1, len(outputs), device=hr.device)
        return levels / self.threshold - steps_K[:, None, None]

    @abstractmethod
    def compare(self, margins_BKHW: Tensor, wanted_BKHW: Tensor) -> Tensor:
        """A scalar: how far the margins are from what they should be, as a mean over pixels."""


@ROUTING_LOSSES.register("gain-regression")
class GainRegression(_GainObjective):
    """The margins learn the gain itself, by squared differences."""

    def compare(self, margins_BKHW: Tensor, wanted_BKHW: Tensor) -> Tensor:
        """Least where a margin is the mean of what is wanted of its pixels."""
        return F.mse_loss(margins_BKHW, wanted_BKHW)


@ROUTING_LOSSES.register("gain-rank")
class GainRank(_GainObjective):
    """The margins learn the order of an image's pixels by gain, and which ones are above 0.

    A logistic loss for each of some pairs, which weighs as much as their gains differ; a pixel's
    pairs are other pixels of its image, and one that is wanted at margin 0.
    """

    def compare(self, margins_BKHW: Tensor, wanted_BKHW: Tensor) -> Tensor:
        """Least where all pairs of an image are in order."""
        margins_BKQ, wanted_BKQ = margins_BKHW.flatten(2), wanted_BKHW.flatten(2)
        losses = [_pairs_loss(margins_BKQ, wanted_BKQ)]
        for share in _PARTNERS:
            shift = round(share * margins_BKQ.shape[2])
            losses.append(
                _pairs_loss(
                    margins_BKQ - margins_BKQ.roll(shift, dims=2),
                    wanted_BKQ - wanted_BKQ.roll(shift, dims=2),
                )
            )
        return torch.stack(losses).mean()


def _pairs_loss(margins: Tensor, wanted: Tensor) -> Tensor:
    """Of pairs whose margins, and wanted margins, differ by so much."""
    return (F.softplus(-margins * wanted.sign()) * wanted.abs()).mean()
