"""FSRCNN (Dong et al., ECCV 2016), RGB variant. Module names are the published ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.backbones.base import SRNetwork, check_sizes
from models.registry import MODELS
from models.row_graph import RowGraph, sequential_graph
from models.streams import RowStream, sequential_rows

# Transposed 9x9 convolution: (padding, output_padding) that give exactly scale x the size.
_TAIL_PADDING = {2: (4, 1), 3: (3, 0), 4: (3, 1)}


@MODELS.register("fsrcnn")
class FSRCNN(SRNetwork):
    """FSRCNN as an original network or, with `no_upsampling`, as a backbone.

    Args:
        d: feature channels.
        s: channels of the shrunken middle part.
        m: 3x3 convolutions of the middle part (no activation between them, as published).
        upscale: 2, 3 or 4.
        no_upsampling: True for the backbone.
        data_norm: ``{mean, std}``; default zeros and ones.
    """

    def __init__(
        self,
        *,
        d: int = 56,
        s: int = 12,
        m: int = 4,
        upscale: int = 4,
        no_upsampling: bool = False,
        data_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(scale=upscale, no_upsampling=no_upsampling, data_norm=data_norm)
        check_sizes(d=d, s=s, m=m)
        self.out_dim = d
        self.receptive_radius_px = 2 + m
        self.head_conv = nn.Sequential(nn.Conv2d(3, d, 5, padding=2), nn.PReLU())
        self.body_conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(d, s, 1), nn.PReLU()),
            *(nn.Conv2d(s, s, 3, padding=1) for _ in range(m)),
            nn.PReLU(),
            nn.Sequential(nn.Conv2d(s, d, 1), nn.PReLU()),
        )
        if not no_upsampling:
            padding, output_padding = _TAIL_PADDING[upscale]
            self.tail_conv = nn.ConvTranspose2d(
                d, 3, 9, stride=upscale, padding=padding, output_padding=output_padding
            )

    def features(self, x: Tensor) -> Tensor:
        return self.body_conv(self.head_conv(x))

    def stream(self) -> RowStream:
        return sequential_rows([self.head_conv, self.body_conv])

    def graph(self) -> RowGraph:
        """See `SRNetwork.graph`."""
        return sequential_graph([self.head_conv, self.body_conv])

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        return self.tail_conv(feat)
