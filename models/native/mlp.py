"""The weights of pixel-level MLPs in the order that the kernels read them.

Axes: C channels, D width of the first layer, O outputs, h w LR, H W output.
"""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from models.grid import PixelGrid
from models.sampler import LIIFSampler

# Outputs of a pair of matrix tiles, and inputs of a tile.
PAIR = 32


@dataclass(frozen=True)
class NativeMLP:
    """A sampler's weights in the order that the kernels read them, float32.

    ``W1 [f; rel; cell] + b1 = Wf f + wy rel_y + wx rel_x + (Wc cell + b1)``; see `models.sampler`.

    Attributes:
        layers: (weights in tiles, bias) of each layer; the first is Wf and has no bias.
        widths: of the features, of each hidden layer, and O.
        geometry_4D: the columns of W1 for rel_y, rel_x, cell_y, cell_x.
        bias_D: b1.
        half_layers: (weights in pairs of matrix tiles, bfloat16, and bias, filled up) of each
            layer; None where it runs in float32.
        phases: what position adds to the first layer, of each integer scale so far.
    """

    layers: list[tuple[Tensor, Tensor | None]]
    widths: list[int]
    geometry_4D: Tensor
    bias_D: Tensor
    half_layers: list[tuple[Tensor, Tensor]] | None = None
    phases: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def pack(
        cls, sampler: LIIFSampler, tile: int, *, margins: bool = False, half: bool = False
    ) -> "NativeMLP":
        """Pack a sampler's weights.

        Args:
            tile: the most outputs that are computed at once.
            margins: give each output relative to the first one, which is left out.
            half: to run in bfloat16, see `mlp_amx.h`; for MLPs of two layers or more and at most
                32 outputs.
        """
        pairs = [(layer.weight.detach(), layer.bias.detach()) for layer in sampler.imnet.linears]
        if margins:
            weight, bias = pairs[-1]
            pairs[-1] = weight[1:] - weight[:1], bias[1:] - bias[:1]
        (first, first_bias), *rest = [(w.float(), b.float()) for w, b in pairs]
        channels = sampler.in_dim
        layers: list[tuple[Tensor, Tensor | None]] = [(_in_tiles(first[:, :channels], tile), None)]
        layers += [(_in_tiles(weight, tile), bias.clone()) for weight, bias in rest]
        widths = [channels, len(first), *(len(weight) for weight, _ in rest)]
        geometry_4D = first[:, channels:].t().clone()
        half_layers = None
        if half and len(rest) > 0 and widths[-1] <= PAIR:
            no_bias = torch.zeros(len(first))
            half_layers = [
                (_in_pairs(weight), _filled(bias))
                for weight, bias in [(first[:, :channels], no_bias), *rest]
            ]
        return cls(layers, widths, geometry_4D, first_bias.clone(), half_layers)

    @property
    def out_dim(self) -> int:
        """O, the number of outputs."""
        return self.widths[-1]

    def flops(self, lr_pixels: int, pixels: int) -> int:
        """Executed FLOPs: the first layer on LR pixels, the others on output pixels.

        Without those of lanes that fill a vector up: at most 31 pixels in a segment's last group.
        """
        first, *rest = (a * b for a, b in itertools.pairwise(self.widths))
        return 2 * (lr_pixels * first + pixels * sum(rest))

    def tables(self, grid: PixelGrid, lanes: int) -> tuple[Tensor, Tensor | None]:
        """What position adds to the first layer; D is filled up to a multiple of `lanes`.

        Returns:
            at an integer scale (scale * scale, D), by phase, and None; else the columns' part
            (W, D) and the rows' (H, D), which holds the constant.
        """
        scale = grid.integer_scale
        # The same in all runs of rows.
        if scale is not None and scale in self.phases:
            return self.phases[scale], None
        padding = 0, -len(self.bias_D) % lanes
        rel_y, rel_x, cell_y, cell_x = F.pad(self.geometry_4D, padding)
        constant_D = F.pad(self.bias_D, padding)
        constant_D = constant_D + cell_y * grid.rows.cell + cell_x * grid.cols.cell
        rows_HD = grid.rows.rel[:, None] * rel_y + constant_D
        cols_WD = grid.cols.rel[:, None] * rel_x
        if scale is None:
            return cols_WD, rows_HD
        phases_SSD = rows_HD[:scale, None] + cols_WD[None, :scale]
        if grid.rows.out_len:
            self.phases[scale] = phases_SSD.flatten(0, 1)
        return phases_SSD.flatten(0, 1), None


def _in_tiles(weight_OI: Tensor, tile: int) -> Tensor:
    """Rows in groups of about equal size, at most `tile`; of each group (inputs, rows)."""
    outputs = len(weight_OI)
    count = -(-outputs // tile)
    ends = [t * outputs // count for t in range(count + 1)]
    groups = [weight_OI[a:b].t().flatten() for a, b in itertools.pairwise(ends)]
    return torch.cat(groups)


def _filled(values: Tensor) -> Tensor:
    """The last axis with zeros up to a pair of matrix tiles."""
    return F.pad(values, (0, -values.shape[-1] % PAIR)).contiguous()


def _in_pairs(weight_OI: Tensor) -> Tensor:
    """bfloat16, by pair of output tiles, 32 inputs, tile; of each (inputs / 2, outputs, 2)."""
    full_OI = _filled(_filled(weight_OI).t()).t()
    pairs = full_OI.reshape(-1, 2, PAIR // 2, full_OI.shape[1] // PAIR, PAIR // 2, 2)
    return pairs.permute(0, 3, 1, 4, 2, 5).flatten().bfloat16()
