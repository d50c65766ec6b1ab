"""CARN (Ahn et al., ECCV 2018), the mobile variant with grouped convolutions.

Module names are the published state-dict names. Axes: B batch, C = nf channels, h w LR.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import SRNetwork, check_sizes, conv3x3, shuffle_steps
from models.backbones.carn_fused import FusedCarn
from models.dead_units import Layer, ReluLayer
from models.fuse import fused_copy
from models.normalise import DIV2K_MEAN
from models.registry import MODELS
from models.row_graph import RowGraph
from models.streams import Encoder
from utils.errors import UserError


class ResidualBlock(nn.Module):
    """ReLU(body(x) + x), body = two grouped 3x3 convolutions and a 1x1."""

    def __init__(self, nf: int, group: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv3x3(nf, nf, group),
            nn.ReLU(inplace=True),
            conv3x3(nf, nf, group),
            nn.ReLU(inplace=True),
            nn.Conv2d(nf, nf, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + x)


def fusion(in_dim: int, out_dim: int) -> nn.Sequential:
    """1x1 convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, 1, bias=False), nn.BatchNorm2d(out_dim), nn.ReLU(inplace=True)
    )


def cascade(x: Tensor, steps: Sequence[nn.Module], fusions: Sequence[nn.Module]) -> Tensor:
    """After each step, everything before it and its result are fused by a 1x1."""
    gathered = out = x
    for step, fuse in zip(steps, fusions, strict=True):
        gathered = torch.cat([gathered, step(out)], dim=1)
        out = fuse(gathered)
    return out


def _cascade_step(
    graph: RowGraph,
    x: int,
    steps: Sequence[Callable[[int], int]],
    fusions: Sequence[nn.Sequential],
) -> int:
    """:func:`cascade` as steps of a graph."""
    gathered, out = [x], x
    for step, fuse in zip(steps, fusions, strict=True):
        gathered.append(step(out))
        out = graph.conv(gathered, fuse[0], slope=0)
    return out


def _residual_step(graph: RowGraph, x: int, block: ResidualBlock) -> int:
    first = graph.conv([x], block.body[0], slope=0)
    second = graph.conv([first], block.body[2], slope=0)
    return graph.conv([second], block.body[4], slope=0, added=x)


class CascadeBlock(nn.Module):
    """Cascades one residual block, shared by the three steps."""

    def __init__(self, nf: int, group: int) -> None:
        super().__init__()
        self.b1 = ResidualBlock(nf, group)
        self.c1 = fusion(2 * nf, nf)
        self.c2 = fusion(3 * nf, nf)
        self.c3 = fusion(4 * nf, nf)

    def forward(self, x: Tensor) -> Tensor:
        return cascade(x, [self.b1] * 3, [self.c1, self.c2, self.c3])

    def relu_layers(self) -> list[ReluLayer]:
        """See `models.dead_units`: the residual block's last, read by every fusion after it."""
        last = self.b1.body[-1]
        assert isinstance(last, nn.Conv2d)
        readers: list[tuple[Layer, int]] = []
        for steps, fusing in enumerate((self.c1, self.c2, self.c3), start=1):
            reader = fusing[0]
            assert isinstance(reader, nn.Conv2d)
            # It reads the block's input and, after that, the steps so far.
            readers += [(reader, step * last.out_channels) for step in range(1, steps + 1)]
        return [ReluLayer(last, self.b1, tuple(readers))]


class UpsampleBody(nn.Module):
    """Grouped 3x3, ReLU, PixelShuffle, once per factor of :func:`shuffle_steps`."""

    def __init__(self, nf: int, scale: int, group: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for factor in shuffle_steps(scale):
            layers += [conv3x3(nf, factor**2 * nf, group), nn.ReLU(inplace=True)]
            layers += [nn.PixelShuffle(factor)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """Holds :class:`UpsampleBody` under the published name `up`."""

    def __init__(self, nf: int, scale: int, group: int) -> None:
        super().__init__()
        self.up = UpsampleBody(nf, scale, group)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


@MODELS.register("carn")
class CARN(SRNetwork):
    """CARN as an original network or, with `no_upsampling`, as a backbone.

    Args:
        nf: channels; a multiple of `group`.
        scale: 2, 3 or 4.
        group: groups of the 3x3 convolutions.
        no_upsampling: True for the backbone.
        data_norm: ``{mean, std}``; default DIV2K's mean.
    """

    default_mean = DIV2K_MEAN
    # entry 1; three blocks of three steps of two 3x3 convolutions.
    receptive_radius_px = 1 + 3 * 3 * 2

    def __init__(
        self,
        *,
        nf: int = 64,
        scale: int = 4,
        group: int = 4,
        no_upsampling: bool = False,
        data_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(scale=scale, no_upsampling=no_upsampling, data_norm=data_norm)
        check_sizes(nf=nf, group=group)
        if nf % group:
            raise UserError(f"carn: nf {nf} is not a multiple of group {group}")
        self.out_dim = nf
        self.entry = conv3x3(3, nf)
        self.b1 = CascadeBlock(nf, group)
        self.b2 = CascadeBlock(nf, group)
        self.b3 = CascadeBlock(nf, group)
        self.c1 = fusion(2 * nf, nf)
        self.c2 = fusion(3 * nf, nf)
        self.c3 = fusion(4 * nf, nf)
        if not no_upsampling:
            self.upsample = Upsample(nf, scale, group)
            self.exit = conv3x3(nf, 3)

    def features(self, x: Tensor) -> Tensor:
        return cascade(self.entry(x), [self.b1, self.b2, self.b3], [self.c1, self.c2, self.c3])

    def fused(self, dtype: torch.dtype = torch.float32) -> Encoder:
        return FusedCarn(fused_copy(self), dtype)

    def graph(self) -> RowGraph:
        """See `SRNetwork.graph`."""
        network, graph = fused_copy(self), RowGraph()

        def in_block(x: int, block: CascadeBlock) -> int:
            steps = [lambda x: _residual_step(graph, x, block.b1)] * 3
            return _cascade_step(graph, x, steps, [block.c1, block.c2, block.c3])

        blocks = (network.b1, network.b2, network.b3)
        steps = [functools.partial(in_block, block=block) for block in blocks]
        x = graph.conv([RowGraph.IMAGE], network.entry)
        _cascade_step(graph, x, steps, [network.c1, network.c2, network.c3])
        return graph

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        return self.exit(self.upsample(feat))
