"""A pixel-level MLP's weights as the kernels read them.

Axes: C feature channels, D (padded) hidden width, O outputs, P padded outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from models.sampler import LIIFSampler

# Matrix units take no smaller sides.
_SMALLEST = 16


@dataclass(frozen=True)
class Pieces:
    """A layer's units, cut into powers of two: a kernel's tensors have no other sides.

    Padding 74 units to 128 would cost 2.6 times the products of 80 = 64 + 16.
    """

    sizes: tuple[int, ...]

    @classmethod
    def of(cls, width: int, largest: int | None) -> "Pieces":
        """Pieces for at least `width` units: equal ones of at most `largest`, then a smaller.

        Where there is no largest, it is one.
        """
        if largest is None:
            return cls((max(_SMALLEST, _round_up(width)),))
        width = -(-width // _SMALLEST) * _SMALLEST
        size = min(largest, 1 << (width.bit_length() - 1))
        whole, rest = divmod(width, size)
        return cls((size,) * whole + ((_round_up(rest),) if rest else ()))

    @property
    def starts(self) -> tuple[int, ...]:
        """First unit of each piece."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @property
    def width(self) -> int:
        """Units, padding included."""
        return sum(self.sizes)


@dataclass(frozen=True)
class KernelMLP:
    """The weights of a :class:`LIIFSampler`, its first layer split over the grid.

    ``W1 [f; rel; cell] + b1 = Wf f + wy rel_y + wx rel_x + (Wc cell + b1)``; see `models.sampler`.
    Padding is zero.

    Attributes:
        feature_CD: Wf transposed, of the product at LR resolution.
        geometry_5D: float32, the columns of W1 for rel_y, rel_x, cell_y, cell_x, and b1.
        weights: flat, the other layers' weights transposed: (D, D) each, the last (D, P).
        biases: flat, float32: (D,) each, the last (P,).
        hidden: pieces of the hidden layers; where there is none, of the outputs.
        outputs: pieces of the outputs.
        layers: how many follow the first.
        out_dim: O.
    """

    feature_CD: Tensor
    geometry_5D: Tensor
    weights: Tensor
    biases: Tensor
    hidden: Pieces
    outputs: Pieces
    layers: int
    out_dim: int

    @classmethod
    def pack(
        cls,
        sampler: LIIFSampler,
        dtype: torch.dtype,
        *,
        largest_piece: int | None,
        margins: bool = False,
    ) -> "KernelMLP":
        """Pack a sampler's weights.

        Args:
            dtype: of the products; geometry, biases and sums are float32.
            largest_piece: see :class:`Pieces`.
            margins: give each output relative to the first one, which is left out: of a
                classifier's logits, routing needs no more.
        """
        linears = [(layer.weight.detach(), layer.bias.detach()) for layer in sampler.imnet.linears]
        if margins:
            weight, bias = linears[-1]
            linears[-1] = weight[1:] - weight[:1], bias[1:] - bias[:1]
        (first, first_bias), *rest = linears
        out_dim = len(linears[-1][0])
        hidden = outputs = Pieces((max(_SMALLEST, _round_up(out_dim)),))
        if rest:
            widest = max(len(weight) for weight, _ in linears[:-1])
            hidden = Pieces.of(widest, largest_piece)
        D = hidden.width
        widths = [D] * (len(rest) - 1) + [outputs.width] * min(1, len(rest))
        layers = [(*layer, width) for layer, width in zip(rest, widths, strict=True)]
        columns = _padded(first.t(), first.shape[1], D)
        return cls(
            feature_CD=columns[: sampler.in_dim].to(dtype).contiguous(),
            geometry_5D=torch.cat([columns[sampler.in_dim :], _padded(first_bias[None], 1, D)]),
            weights=_flat([_padded(weight.t(), D, width) for weight, _, width in layers], first).to(
                dtype
            ),
            biases=_flat([_padded(bias[None], 1, width) for _, bias, width in layers], first),
            hidden=hidden,
            outputs=outputs,
            layers=len(rest),
            out_dim=out_dim,
        )

    def flops(self, lr_pixels: int, pixels: int) -> int:
        """Executed FLOPs: the first layer on LR pixels, the others on output pixels."""
        return 2 * (lr_pixels * self.feature_CD.numel() + pixels * self.weights.numel())


def _round_up(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _flat(matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices] or [like.new_zeros(0)])
