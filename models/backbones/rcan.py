"""RCAN (Zhang et al., ECCV 2018). Axes: B batch, C = nf channels, h w LR."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.backbones.base import SRNetwork, check_sizes, conv3x3, shuffle_steps
from models.normalise import DIV2K_MEAN
from models.registry import MODELS
from utils.errors import UserError


class ChannelAttention(nn.Module):
    """Scales each channel by a gate computed from the channels' means over the whole image."""

    def __init__(self, nf: int, reduction: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(
            nn.Conv2d(nf, nf // reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(nf // reduction, nf, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(self.avg_pool(x))


class ResidualAttentionBlock(nn.Module):
    """x + attention(conv(ReLU(conv(x))))."""

    def __init__(self, nf: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv3x3(nf, nf), nn.ReLU(inplace=True), conv3x3(nf, nf), ChannelAttention(nf, reduction)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualGroup(nn.Module):
    """x + conv(blocks(x))."""

    def __init__(self, nf: int, nb: int, reduction: int) -> None:
        super().__init__()
        blocks = (ResidualAttentionBlock(nf, reduction) for _ in range(nb))
        self.body = nn.Sequential(*blocks, conv3x3(nf, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@MODELS.register("rcan")
class RCAN(SRNetwork):
    """RCAN as an original network or, with `no_upsampling`, as a backbone.

    Args:
        nf: channels.
        ng: residual groups.
        nb: blocks in a group.
        reduction: factor by which channel attention narrows; at most `nf`.
        scale: 2, 3 or 4.
        no_upsampling: True for the backbone.
        data_norm: ``{mean, std}``; default DIV2K's mean.
    """

    default_mean = DIV2K_MEAN
    tail_radius_px = 2
    pools_globally = True

    def __init__(
        self,
        *,
        nf: int = 64,
        ng: int = 10,
        nb: int = 20,
        reduction: int = 16,
        scale: int = 4,
        no_upsampling: bool = False,
        data_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(scale=scale, no_upsampling=no_upsampling, data_norm=data_norm)
        check_sizes(nf=nf, ng=ng, nb=nb)
        if not 1 <= reduction <= nf:
            raise UserError(f"rcan: reduction {reduction} must lie between 1 and nf = {nf}")
        self.out_dim = nf
        self.receptive_radius_px = 2 + ng * (2 * nb + 1)
        self.head = nn.Sequential(conv3x3(3, nf))
        groups = (ResidualGroup(nf, nb, reduction) for _ in range(ng))
        self.body = nn.Sequential(*groups, conv3x3(nf, nf))
        if not no_upsampling:
            steps: list[nn.Module] = []
            for factor in shuffle_steps(scale):
                steps += [conv3x3(nf, factor**2 * nf), nn.PixelShuffle(factor)]
            self.tail = nn.Sequential(nn.Sequential(*steps), conv3x3(nf, 3))

    def features(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.body(x)

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        return self.tail(feat)
