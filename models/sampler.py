"""Pixel-level upsamplers and classifiers: an MLP on (feature, relative position, cell).

Axes: B batch, C feature channels, h w LR, H W output, Q output pixels, O outputs, D hidden width,
P phases (output pixels per LR pixel at an integer scale).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.grid import PixelGrid
from models.registry import MODELS
from utils.errors import UserError


@MODELS.register("mlp")
class MLP(nn.Module):
    """Linear layers with ReLU between them, on the last axis.

    Args:
        in_dim: width of the input.
        out_dim: width of the output.
        hidden_list: widths of the hidden layers; may be empty.

    Raises:
        UserError: a width below 1.
    """

    def __init__(self, *, in_dim: int, out_dim: int, hidden_list: Sequence[int]) -> None:
        super().__init__()
        if any(width < 1 for width in hidden_list):
            raise UserError(
                f"config: `hidden_list` takes widths of 1 or more, not {list(hidden_list)}"
            )
        layers: list[nn.Module] = []
        width = in_dim
        for hidden in hidden_list:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        layers.append(nn.Linear(width, out_dim))
        self.layers = nn.Sequential(*layers)

    @property
    def linears(self) -> list[nn.Linear]:
        """The linear layers in order."""
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) to (..., out_dim)."""
        return self.layers(x)


@MODELS.register("liif-sampler")
class LIIFSampler(nn.Module):
    """Turns features into one value per output pixel, at any output size (after LIIF, CVPR 2021).

    Args:
        in_dim: channels of the features.
        out_dim: values per pixel (3 for RGB, the number of upsamplers for a classifier).
        imnet_spec: the MLP, which gets ``in_dim + 4`` inputs.
    """

    def __init__(self, *, in_dim: int, out_dim: int, imnet_spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.in_dim = in_dim
        self.out_dim = out_dim
        self.imnet: MLP = MODELS.make(imnet_spec, "imnet_spec", in_dim=in_dim + 4, out_dim=out_dim)
        if not isinstance(self.imnet, MLP):
            raise UserError(f"config: `imnet_spec` must name `mlp`, not `{imnet_spec['name']}`")

    def forward(self, feat_BChw: Tensor, grid: PixelGrid, pixels_Q: Tensor | None = None) -> Tensor:
        """The straightforward formulation, pixel by pixel: the oracle for :meth:`dense`.

        Returns:
            (B, Q, out_dim), for all pixels in row-major order where `pixels_Q` is None.
        """
        return self.imnet(grid.sampler_inputs(feat_BChw, pixels_Q))

    def dense(self, feat_BChw: Tensor, grid: PixelGrid) -> Tensor:
        """All pixels of the grid, with the first layer split into its separable parts.

        ``W1 [f; rel; cell] + b1 = (Wf f)[n_i, m_j] + wy rel_y_i + wx rel_x_j + (Wc cell + b1)``:
        the widest product runs once per LR pixel instead of once per output pixel. Equal to
        :meth:`forward` up to rounding; differentiable.

        Returns:
            (B, out_dim, H, W).
        """
        first, *rest = self.imnet.linears
        if feat_BChw.is_cuda and grid.integer_scale is not None:
            return self._dense_by_pixel(feat_BChw, grid, grid.integer_scale)
        lr_BDhw = F.conv2d(feat_BChw, first.weight[:, : self.in_dim, None, None])
        row_DH, col_DW = self.geometry(grid)
        row_DH, col_DW = row_DH.to(lr_BDhw.dtype), col_DW.to(lr_BDhw.dtype)
        scale = grid.integer_scale
        if scale is None:
            nearest = lr_BDhw[:, :, grid.rows.nearest][:, :, :, grid.cols.nearest]
            x_BDQ = (nearest + row_DH[:, :, None] + col_DW[:, None, :]).flatten(2)
            return _per_pixel(x_BDQ, rest).unflatten(2, grid.out_size)
        # Phase layout: the s x s output pixels of an LR pixel differ only by a bias.
        phase_DP = (row_DH[:, :scale, None] + col_DW[:, None, :scale]).flatten(1)
        x_BDQ = (lr_BDhw.flatten(2)[:, :, None, :] + phase_DP[:, :, None]).flatten(2)
        out = _per_pixel(x_BDQ, rest)
        batch, (h, w) = len(feat_BChw), feat_BChw.shape[-2:]
        out = out.view(batch, self.out_dim, scale, scale, h, w)
        return out.permute(0, 1, 4, 2, 5, 3).reshape(batch, self.out_dim, h * scale, w * scale)

    def _dense_by_pixel(self, feat_BChw: Tensor, grid: PixelGrid, scale: int) -> Tensor:
        """:meth:`dense` for GPUs: a pixel's units lie together, as matrix products like them.

        Widths are padded to multiples of 8: only then products of half precision run on matrix
        units at full speed.
        """
        first, *rest = self.imnet.linears
        row_DH, col_DW = self.geometry(grid)
        phase_PD = (row_DH[:, :scale, None] + col_DW[:, None, :scale]).flatten(1).t()
        width = _to_8(first.out_features) if rest else first.out_features
        weight = _padded(first.weight[:, : self.in_dim], width, self.in_dim)
        x_BhwD = F.linear(feat_BChw.permute(0, 2, 3, 1), weight)
        phase_PD = F.pad(phase_PD, (0, width - first.out_features)).to(x_BhwD.dtype)
        x = x_BhwD[:, :, :, None] + phase_PD
        for layer in rest:
            columns = self.out_dim if layer is rest[-1] else _to_8(layer.out_features)
            weight = _padded(layer.weight, columns, width)
            bias = F.pad(layer.bias, (0, columns - layer.out_features))
            x, width = F.linear(torch.relu(x), weight, bias), columns
        batch, (h, w) = len(feat_BChw), feat_BChw.shape[-2:]
        out = x.view(batch, h, w, scale, scale, self.out_dim).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(batch, self.out_dim, h * scale, w * scale)

    def geometry(self, grid: PixelGrid) -> tuple[Tensor, Tensor]:
        """What rows (D, H) and columns (D, W) add to the first layer; rows hold cell and bias."""
        first = self.imnet.linears[0]
        rel_y, rel_x, cell_y, cell_x = first.weight[:, self.in_dim :].unbind(1)
        constant = first.bias + cell_y * grid.rows.cell + cell_x * grid.cols.cell
        row_DH = rel_y[:, None] * grid.rows.rel + constant[:, None]
        return row_DH, rel_x[:, None] * grid.cols.rel


def _to_8(width: int) -> int:
    return -(-width // 8) * 8


def _padded(weight: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))


def _per_pixel(x_BDQ: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """(B, D, Q) through ReLU and linear layers to (B, O, Q).

    On a CPU image by image: an image's activations stay in cache (measured: half the time of one
    batched product over 16 images).
    """
    if x_BDQ.device.type == "cpu" and len(x_BDQ) > 1:
        return torch.stack([_one_image(x_DQ, layers) for x_DQ in x_BDQ.unbind()])
    if len(x_BDQ) == 1:
        # A view without an index: the gradient of x[0] is written into zeros.
        return _one_image(x_BDQ.squeeze(0), layers).unsqueeze(0)
    for layer in layers:
        x_BDQ = torch.matmul(layer.weight, torch.relu(x_BDQ)) + layer.bias[:, None]
    return x_BDQ


def _one_image(x_DQ: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    for layer in layers:
        x_DQ = torch.addmm(layer.bias[:, None], layer.weight, torch.relu(x_DQ))
    return x_DQ
