"""The regular output grid over an LR feature map: no coordinate tensors.

For LR size (h, w) and output size (H, W), output row i lies at ``u = (i + 0.5) h / H - 0.5`` LR
pixels; its nearest LR row is ``n = round(u)`` (half to even), ``rel = 2 (u - n)`` and
``cell = 2 h / H``; columns alike. Everything is decided in integer arithmetic, so both the
straightforward and the factorised path read the same table.

Axes: B batch, C channels, h w LR, H W output, Q output pixels in row-major order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class GridAxis:
    """One axis of the grid.

    Attributes:
        lr_len: LR pixels.
        out_len: output pixels.
        nearest: (out_len,) int64, index of the nearest LR pixel.
        rel: (out_len,) float32, twice the offset from it in LR pixels, in [-1, 1].
        cell: twice the size of an output pixel in LR pixels.
    """

    lr_len: int
    out_len: int
    nearest: Tensor
    rel: Tensor
    cell: float

    @classmethod
    def build(cls, lr_len: int, out_len: int, device: torch.device | str = "cpu") -> "GridAxis":
        """Table of one axis.

        Raises:
            UserError: a length below 1.
        """
        if lr_len < 1 or out_len < 1:
            raise UserError(f"image sides must be at least 1 pixel, got {lr_len} -> {out_len}")
        # u = numerator / (2 out_len)
        numerator = (2 * torch.arange(out_len, dtype=torch.int64) + 1) * lr_len - out_len
        shifted = numerator + out_len
        nearest = torch.div(shifted, 2 * out_len, rounding_mode="floor")
        tie = shifted % (2 * out_len) == 0
        nearest = (nearest - (tie & (nearest % 2 == 1)).long()).clamp(0, lr_len - 1)
        rel = (numerator - 2 * out_len * nearest).double() / out_len
        return cls(
            lr_len, out_len, nearest.to(device), rel.float().to(device), 2 * lr_len / out_len
        )

    @property
    def integer_scale(self) -> int | None:
        """out_len / lr_len where that is an integer, else None."""
        return self.out_len // self.lr_len if self.out_len % self.lr_len == 0 else None


@dataclass(frozen=True)
class PixelGrid:
    """The output grid: an axis of rows and one of columns."""

    rows: GridAxis
    cols: GridAxis

    @classmethod
    def build(
        cls,
        lr_size: tuple[int, int],
        out_size: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> "PixelGrid":
        """Grid for LR (h, w) and output (H, W), with its tables on `device`."""
        return cls(
            GridAxis.build(lr_size[0], out_size[0], device),
            GridAxis.build(lr_size[1], out_size[1], device),
        )

    @property
    def out_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.rows.out_len, self.cols.out_len

    @property
    def integer_scale(self) -> int | None:
        """The scale where it is the same integer on both axes, else None."""
        scale = self.rows.integer_scale
        return scale if scale == self.cols.integer_scale else None

    def sampler_inputs(self, feat_BChw: Tensor, pixels_Q: Tensor | None = None) -> Tensor:
        """The input of a pixel-level MLP: [feature, rel_y, rel_x, cell_y, cell_x] per pixel.

        Args:
            feat_BChw: features.
            pixels_Q: int64 row-major indices into the H W output pixels; None for all of them.

        Returns:
            (B, Q, C + 4) in the features' dtype.
        """
        width = self.cols.out_len
        if pixels_Q is None:
            pixels_Q = torch.arange(self.rows.out_len * width, device=feat_BChw.device)
        row = torch.div(pixels_Q, width, rounding_mode="floor")
        col = pixels_Q - row * width
        source = self.rows.nearest[row] * self.cols.lr_len + self.cols.nearest[col]
        feat_BQC = feat_BChw.flatten(2)[:, :, source].transpose(1, 2)
        position = torch.stack([self.rows.rel[row], self.cols.rel[col]], dim=-1)
        cell = position.new_tensor([self.rows.cell, self.cols.cell]).expand_as(position)
        geometry = torch.cat([position, cell], dim=-1).to(feat_BQC.dtype)
        return torch.cat([feat_BQC, geometry.expand(len(feat_BQC), -1, -1)], dim=-1)
