"""RCAN (Zhang et al., ECCV 2018). Axes: B batch, C = nf channels, h w LR."""

from collections.abc import Mapping
from typing import Any

import torch
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
        self.nb = nb
        self.receptive_radius_px = 2 + ng * (2 * nb + 1)
        self.head = nn.Sequential(conv3x3(3, nf))
        groups = (ResidualGroup(nf, nb, reduction) for _ in range(ng))
        self.body = nn.Sequential(*groups, conv3x3(nf, nf))
        if not no_upsampling:
            steps: list[nn.Module] = []
            for factor in shuffle_steps(scale):
                steps += [conv3x3(nf, factor**2 * nf), nn.PixelShuffle(factor)]
            self.tail = nn.Sequential(nn.Sequential(*steps), conv3x3(nf, 3))

    def deepened(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of an RCAN with at most `nb` blocks to a group, as one of this depth.

        The blocks that it lacks come last in each group and add nothing yet, as the convolution
        before their attention is 0 (after Net2Net, Chen et al., ICLR 2016): features stay equal,
        and training goes on from there. A state dict of this or a greater depth is returned as
        it is.
        """
        nb = self.nb
        # A group's blocks are numbered from 0, and its last convolution is number nb.
        theirs = max(
            (int(key.split(".")[3]) for key in state if key.startswith("body.0.body.")), default=nb
        )
        if theirs >= nb:
            return dict(state)
        grown = {}
        for key, value in state.items():
            part = key.split(".")
            if part[:1] == ["body"] and part[2:4] == ["body", str(theirs)]:
                part[3] = str(nb)
            grown[".".join(part)] = value
        for key, value in self.state_dict().items():
            if key not in grown and key.startswith("body."):
                adds = key.split(".")[4:6] == ["body", "2"]
                grown[key] = torch.zeros_like(value) if adds else value.clone()
        return grown

    def features(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x + self.body(x)

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        return self.tail(feat)
