"""The regular output grid over an LR feature map: no coordinate tensors.

For LR size (h, w) and output size (H, W), output row i lies at ``u = (i + 0.5) h / H - 0.5`` LR
pixels; its nearest LR row is ``n = round(u)`` (half to even), ``rel = 2 (u - n)`` and
``cell = 2 h / H``; columns alike. Everything is decided in integer arithmetic, so both the
straightforward and the factorised path read the same table.

Axes: B batch, C channels, h w LR, H W output, Q output pixels in row-major order.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.errors import UserError


@dataclass(frozen=True)
class GridAxis:
    """One axis of the grid, or a part of it.

    Attributes:
        lr_len: LR pixels that `nearest` points into.
        out_len: output pixels.
        nearest: (out_len,) int64, index of the nearest LR pixel.
        rel: (out_len,) float32, twice the offset from it in LR pixels, in [-1, 1].
        cell: twice the size of an output pixel in LR pixels.
        integer_scale: output pixels per LR pixel where that is an integer, else None.
        lower, upper: (out_len,) int64, the LR pixels of the *whole* axis on both sides, the same
            beyond the border.
        weight: (out_len,) float32 in [0, 1), the weight of `upper` in linear interpolation.
        span: the first of `lower` and the last of `upper`.
    """

    lr_len: int
    out_len: int
    nearest: Tensor
    rel: Tensor
    cell: float
    integer_scale: int | None
    lower: Tensor
    upper: Tensor
    weight: Tensor
    span: tuple[int, int]

    @classmethod
    def build(cls, lr_len: int, out_len: int, device: torch.device | str = "cpu") -> "GridAxis":
        """Table of one axis.

        Raises:
            UserError: a length below 1.
        """
        if lr_len < 1 or out_len < 1:
            raise UserError(f"image sides must be at least 1 pixel, got {lr_len} -> {out_len}")
        # u = numerator / denominator
        numerator = (2 * torch.arange(out_len, dtype=torch.int64) + 1) * lr_len - out_len
        denominator = 2 * out_len
        shifted = numerator + out_len
        nearest = torch.div(shifted, denominator, rounding_mode="floor")
        tie = shifted % denominator == 0
        nearest = (nearest - (tie & (nearest % 2 == 1)).long()).clamp(0, lr_len - 1)
        rel = (numerator - denominator * nearest).double() / out_len
        inside = numerator.clamp(0, (lr_len - 1) * denominator)
        lower = torch.div(inside, denominator, rounding_mode="floor")
        weight = (inside - denominator * lower).double() / denominator
        upper = (lower + 1).clamp_max(lr_len - 1)
        return cls(
            lr_len=lr_len,
            out_len=out_len,
            nearest=nearest.to(device),
            rel=rel.float().to(device),
            cell=2 * lr_len / out_len,
            integer_scale=out_len // lr_len if out_len % lr_len == 0 else None,
            lower=lower.to(device),
            upper=upper.to(device),
            weight=weight.float().to(device),
            span=(int(lower[0]), int(upper[-1])),
        )

    def part(self, lr_first: int, lr_last: int) -> tuple["GridAxis", slice]:
        """The output pixels whose nearest LR pixel is in [lr_first, lr_last), and where they are.

        `nearest` of the part counts from `lr_first`.
        """
        bounds = self.nearest.new_tensor([lr_first, lr_last])
        first, last = torch.searchsorted(self.nearest, bounds).tolist()
        run = slice(first, last)
        lower, upper = self.lower[run], self.upper[run]
        span = (int(lower[0]), int(upper[-1])) if first < last else (0, -1)
        part = GridAxis(
            lr_len=lr_last - lr_first,
            out_len=last - first,
            nearest=self.nearest[run] - lr_first,
            rel=self.rel[run],
            cell=self.cell,
            integer_scale=self.integer_scale,
            lower=lower,
            upper=upper,
            weight=self.weight[run],
            span=span,
        )
        return part, run


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
        """Grid for LR (h, w) and output (H, W), with its tables on `device`.

        Built once and then remembered: training asks for the same one in every iteration.
        """
        (h, w), (height, width) = lr_size, out_size
        return remembered_grid((h, w), (height, width), torch.device(device))

    @property
    def out_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.rows.out_len, self.cols.out_len

    @property
    def integer_scale(self) -> int | None:
        """The scale where it is the same integer on both axes, else None."""
        scale = self.rows.integer_scale
        return scale if scale == self.cols.integer_scale else None

    def part(self, lr_first: int, lr_last: int) -> tuple["PixelGrid", slice]:
        """The grid of LR rows [lr_first, lr_last), and its output rows; see `GridAxis.part`."""
        rows, run = self.rows.part(lr_first, lr_last)
        return PixelGrid(rows, self.cols), run

    def bilinear(self, lr_BChw: Tensor) -> Tensor:
        """Bilinear interpolation of the *whole* LR image at this grid's pixels: (B, C, H, W).

        Beyond the border the outermost pixels go on (``F.interpolate`` with
        ``align_corners=False``, but with weights that are exact at any size).
        """
        rows, cols = self.rows, self.cols
        if rows.out_len == 0:
            return lr_BChw.new_empty(*lr_BChw.shape[:2], 0, cols.out_len)
        # Columns first: there are fewer LR rows, and whole rows are then copied as they are.
        first, last = rows.span
        source = lr_BChw[:, :, first : last + 1]
        right = source.index_select(3, cols.upper)
        wide = source.index_select(3, cols.lower).lerp_(right, cols.weight.to(right.dtype))
        under = wide.index_select(2, rows.upper - first)
        weight = rows.weight[:, None].to(under.dtype)
        return wide.index_select(2, rows.lower - first).lerp_(under, weight)

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
        # Pixel by pixel in memory first: so a pixel's features are read at once.
        feat_BQC = feat_BChw.flatten(2).transpose(1, 2).contiguous().index_select(1, source)
        position = torch.stack([self.rows.rel[row], self.cols.rel[col]], dim=-1)
        cell = position.new_tensor([self.rows.cell, self.cols.cell]).expand_as(position)
        geometry = torch.cat([position, cell], dim=-1).to(feat_BQC.dtype)
        return torch.cat([feat_BQC, geometry.expand(len(feat_BQC), -1, -1)], dim=-1)


def remembered_grid(
    lr_size: tuple[int, int], out_size: tuple[int, int], device: torch.device
) -> PixelGrid:
    """:meth:`PixelGrid.build`, apart for those who compile: its result is a constant."""
    return _build(lr_size, out_size, device)


@functools.lru_cache(maxsize=32)
def _build(lr_size: tuple[int, int], out_size: tuple[int, int], device: torch.device) -> PixelGrid:
    # Ordinary tensors, as a grid that was first wanted for inference may be trained with later.
    with torch.inference_mode(False):
        return PixelGrid(
            GridAxis.build(lr_size[0], out_size[0], device),
            GridAxis.build(lr_size[1], out_size[1], device),
        )
