"""A pixel-level MLP packed for speed: first layer split over the grid, widths padded.

Arrays are pixel-major, so that gathering a pixel reads one contiguous row.
Axes: C feature channels, D (padded) hidden width, O outputs, Q pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.grid import PixelGrid
from models.sampler import LIIFSampler


@dataclass(frozen=True)
class PackedSampler:
    """The weights of a :class:`LIIFSampler` in the order that :meth:`finish` reads them.

    ``W1 [f; rel; cell] + b1 = Wf f + wy rel_y + wx rel_x + (Wc cell + b1)``; see `models.sampler`.
    Each hidden layer has a unit that is always 1, whose outgoing weights are the next layer's
    bias: a product without a bias saves a pass over its output (measured: a fifth of the time of
    a light upsampler). Widths are padded with zeros.

    Attributes:
        feature_CD: Wf transposed.
        geometry_4D: the columns of W1 for rel_y, rel_x, cell_y, cell_x.
        bias_D: b1, and 1 for the unit that is always 1.
        layers: transposed weights of the other layers; the last, not padded, is given as (O, D).
    """

    feature_CD: Tensor
    geometry_4D: Tensor
    bias_D: Tensor
    layers: list[Tensor]

    @classmethod
    def pack(
        cls,
        sampler: LIIFSampler,
        *,
        dtype: torch.dtype = torch.float32,
        multiple: int = 8,
        margins: bool = False,
    ) -> "PackedSampler":
        """Pack a sampler's weights.

        Args:
            dtype: of the products; sums with geometry are float32.
            multiple: hidden widths are padded to a multiple of this.
            margins: give each output relative to the first one, which is left out: of a
                classifier's logits, routing needs no more.
        """
        weights = [(layer.weight.detach(), layer.bias.detach()) for layer in sampler.imnet.linears]
        if margins:
            weight, bias = weights[-1]
            weights[-1] = weight[1:] - weight[:1], bias[1:] - bias[:1]
        (first, first_bias), *rest = weights
        width = _padded(len(first), multiple) if rest else len(first)
        first_TD = first.new_zeros(sampler.in_dim + 4, width)
        first_TD[:, : len(first)] = first.t()
        bias_D = first.new_zeros(width)
        bias_D[: len(first)] = first_bias
        bias_D[len(first) : len(first) + 1] = 1
        layers = []
        for weight, bias in rest:
            out, used = weight.shape
            last = weight is rest[-1][0]
            columns = out if last else _padded(out, multiple)
            layer = weight.new_zeros(width, columns)
            layer[:used, :out] = weight.t()
            layer[used, :out] = bias
            if not last:
                layer[used, out] = 1
            layers.append((layer.t() if last else layer).to(dtype).contiguous())
            width = columns
        return cls(
            feature_CD=first_TD[: sampler.in_dim].to(dtype).contiguous(),
            geometry_4D=first_TD[sampler.in_dim :].contiguous(),
            bias_D=bias_D,
            layers=layers,
        )

    @property
    def out_dim(self) -> int:
        """O, the number of outputs."""
        return self.layers[-1].shape[0] if self.layers else self.feature_CD.shape[1]

    def flops(self, lr_pixels: int, pixels: int) -> int:
        """Executed FLOPs: the first layer on LR pixels, the others on output pixels."""
        per_pixel = sum(weight.numel() for weight in self.layers)
        return 2 * (lr_pixels * self.feature_CD.numel() + pixels * per_pixel)

    def axes(self, grid: PixelGrid) -> tuple[Tensor, Tensor]:
        """What rows (H, D) and columns (W, D) add to the first layer; rows hold its constant."""
        rel_y, rel_x, cell_y, cell_x = self.geometry_4D
        constant = self.bias_D + cell_y * grid.rows.cell + cell_x * grid.cols.cell
        return grid.rows.rel[:, None] * rel_y + constant, grid.cols.rel[:, None] * rel_x

    def lr_part(self, feat: Tensor) -> Tensor:
        """What each LR pixel adds to the first layer: (..., C) to (..., D) float32.

        Sums with geometry are float32 even in half precision: more exact, and on a CPU a sum of
        a matrix and a row takes a tenth of the time.
        """
        return (feat.to(self.feature_CD.dtype) @ self.feature_CD).float()

    def phases(self, grid: PixelGrid, scale: int) -> Tensor:
        """(scale * scale, D): what each output pixel of an LR pixel adds, at an integer scale."""
        rows_HD, cols_WD = self.axes(grid)
        return (rows_HD[:scale, None] + cols_WD[None, :scale]).flatten(0, 1)

    def finish(self, x_QD: Tensor) -> Tensor:
        """(Q, D) float32 sums of the first layer, overwritten, to (O, Q).

        In float32 the few outputs are the product's rows: as its columns they take twice as long.
        """
        x_QD = x_QD.to(self.feature_CD.dtype)
        if not self.layers:
            return x_QD.t()
        *hidden, last = self.layers
        for weight in hidden:
            x_QD = torch.mm(x_QD.relu_(), weight)
        x_QD.relu_()
        if x_QD.dtype == torch.float32:
            return torch.mm(last, x_QD.t())
        return torch.mm(x_QD, last.t()).t()


def _padded(width: int, multiple: int) -> int:
    """`width` and the unit that is always 1, rounded up."""
    return -(-(width + 1) // multiple) * multiple
