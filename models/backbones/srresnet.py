"""SRResNet without batch norm (MSRResNet of ESRGAN's code line). Published module names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import SRNetwork, check_sizes, conv3x3, shuffle_steps
from models.dead_units import ReluLayer
from models.registry import MODELS
from models.row_graph import RowGraph
from models.streams import ChainRows, ConvRows, PointwiseRows, ResidualRows, RowStream

_SLOPE = 0.1


class ResidualBlock(nn.Module):
    """x + conv2(ReLU(conv1(x))); weights start at 0.1 of Kaiming's scale, so near identity."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(nf, nf)
        self.conv2 = conv3x3(nf, nf)
        for conv in (self.conv1, self.conv2):
            _initialise(conv, gain=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.relu(self.conv1(x)))

    def relu_layers(self) -> list[ReluLayer]:
        """See `models.dead_units`."""
        return [ReluLayer(self.conv1, self.conv1, ((self.conv2, 0),))]

    def stream(self) -> RowStream:
        """See `SRNetwork.stream`."""
        body = ChainRows(ConvRows(self.conv1), ConvRows(self.conv2, relu_first=True))
        return ResidualRows(body)


def _initialise(conv: nn.Conv2d, gain: float) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_in")
    with torch.no_grad():
        conv.weight.mul_(gain)
        if conv.bias is not None:
            conv.bias.zero_()


@MODELS.register("srresnet")
class SRResNet(SRNetwork):
    """SRResNet as an original network or, with `no_upsampling`, as a backbone.

    Args:
        nf: channels.
        nb: residual blocks.
        upscale: 2, 3 or 4.
        no_upsampling: True for the backbone.
        data_norm: ``{mean, std}``; default zeros and ones.
    """

    def __init__(
        self,
        *,
        nf: int = 64,
        nb: int = 16,
        upscale: int = 4,
        no_upsampling: bool = False,
        data_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(scale=upscale, no_upsampling=no_upsampling, data_norm=data_norm)
        check_sizes(nf=nf, nb=nb)
        self.out_dim = nf
        self.receptive_radius_px = 1 + 2 * nb
        self.conv_first = conv3x3(3, nf)
        _initialise(self.conv_first, gain=0.1)
        self.recon_trunk = nn.Sequential(*(ResidualBlock(nf) for _ in range(nb)))
        if no_upsampling:
            return
        self.shuffles = shuffle_steps(upscale)
        for index, factor in enumerate(self.shuffles, start=1):
            conv = conv3x3(nf, factor**2 * nf)
            _initialise(conv, gain=0.1)
            self.add_module(f"upconv{index}", conv)
        self.HRconv = conv3x3(nf, nf)
        self.conv_last = conv3x3(nf, 3)
        for conv in (self.HRconv, self.conv_last):
            _initialise(conv, gain=0.1)

    def features(self, x: Tensor) -> Tensor:
        return self.recon_trunk(F.leaky_relu(self.conv_first(x), _SLOPE))

    def stream(self) -> RowStream:
        streams: list[RowStream] = [ConvRows(self.conv_first)]
        streams.append(PointwiseRows(lambda x: F.leaky_relu(x, _SLOPE)))
        for block in self.recon_trunk:
            assert isinstance(block, ResidualBlock)
            streams.append(block.stream())
        return ChainRows(*streams)

    def graph(self) -> RowGraph:
        """See `SRNetwork.graph`."""
        graph = RowGraph()
        x = graph.conv([RowGraph.IMAGE], self.conv_first, slope=_SLOPE)
        for block in self.recon_trunk:
            hidden = graph.conv([x], block.get_submodule("conv1"), slope=0)
            x = graph.conv([hidden], block.get_submodule("conv2"), added=x)
        return graph

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        out = feat
        for index, factor in enumerate(self.shuffles, start=1):
            conv = self.get_submodule(f"upconv{index}")
            out = F.leaky_relu(F.pixel_shuffle(conv(out), factor), _SLOPE)
        out = self.conv_last(F.leaky_relu(self.HRconv(out), _SLOPE))
        return out + F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False)
