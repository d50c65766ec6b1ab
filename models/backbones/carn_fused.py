"""CARN's encoder for inference: the same function in the order of memory.

Activations are pixel-major rows (B, r, w, C), see `models.streams`. The 1x1 convolutions are matrix
products; those on a concatenation are sums of products, so nothing is concatenated.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from models.elementwise import affine_into
from models.streams import (
    ChainRows,
    ConvRows,
    PointwiseRows,
    RowQueue,
    RowStream,
    aligned,
    push_whole,
)


class FusedCarn(nn.Module):
    """The features of a CARN whose batch norm is folded.

    The first convolution is float32 in any case: an image that is rounded to bfloat16 costs more
    than all other rounding together (0.010 dB on Set5 with it, 0.004 dB without).

    Args:
        carn: a float32 `models.backbones.carn.CARN`; its weights are read.
        dtype: of everything behind the first convolution.
    """

    def __init__(self, carn: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.input_dtype = torch.float32
        self._dtype = dtype
        self.entry: nn.Conv2d = copy.deepcopy(carn.get_submodule("entry"))  # type: ignore[assignment]
        carn = carn.to(dtype)
        self._blocks = [_Block(carn.get_submodule(name)) for name in ("b1", "b2", "b3")]
        self._fusions = [_Fusion(carn.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised to features (B, C, h, w), channels-last in memory."""
        return push_whole(self.stream(), x)

    def stream(self) -> RowStream:
        """See `SRNetwork.stream`."""
        # `entry` has no activation; every other block's input is the ReLU of a fusion.
        blocks = [block.stream(relu_first=index > 0) for index, block in enumerate(self._blocks)]
        cascade = _CascadeRows(blocks, self._fusions)
        convert = PointwiseRows(lambda x: x.to(self._dtype))
        return ChainRows(ConvRows(self.entry), convert, cascade)


class _Fusion:
    """1x1 convolution on a concatenation: one product per part. Its ReLU is left to the caller."""

    def __init__(self, fusion: nn.Module) -> None:
        weight, self._bias = _transposed(fusion.get_submodule("0"))
        self._weights = [part.contiguous() for part in weight.split(weight.shape[1])]

    def __call__(self, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """The rows of each part, in pieces, to the sum's rows (B, r, w, C)."""
        out = _products(parts[0], self._weights[0], self._bias)
        for pieces, weight in zip(parts[1:], self._weights[1:], strict=True):
            for target, piece in aligned(out, pieces):
                for rows, part in zip(target, piece, strict=True):  # an image's are contiguous
                    rows.view(-1, rows.shape[-1]).addmm_(part.flatten(0, 1), weight)
        return out


class _Block:
    """A cascade of three times the same residual block."""

    def __init__(self, block: nn.Module) -> None:
        self._body = block.get_submodule("b1.body")
        self._pointwise = _transposed(self._body.get_submodule("4"))
        self._fusions = [_Fusion(block.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def stream(self, *, relu_first: bool) -> "_CascadeRows":
        steps = [
            _ResidualRows(self._body, *self._pointwise, relu_first=relu_first or index > 0)
            for index in range(3)
        ]
        return _CascadeRows(steps, self._fusions)


class _Step(Protocol):
    """A stream whose input is stored by itself, for others to read it, too."""

    def store(self, rows: Tensor, last: bool) -> Tensor:
        """Take the next rows, which may be overwritten; returns its input: after ReLU if asked."""
        ...

    def advance(self, last: bool) -> Tensor:
        """The output rows that are determined now and were not before."""
        ...


class _ResidualRows:
    """ReLU(body(x) + x), where x is the ReLU of what is stored with `relu_first`."""

    def __init__(self, body: nn.Module, weight: Tensor, bias: Tensor, *, relu_first: bool) -> None:
        first, second = (body.get_submodule(name) for name in ("0", "2"))
        self._first = ConvRows(first, relu_first=relu_first)  # type: ignore[arg-type]
        self._second = ConvRows(second, relu_first=True)  # type: ignore[arg-type]
        self._weight, self._bias = weight, bias
        self._waiting = RowQueue()

    def store(self, rows: Tensor, last: bool) -> Tensor:
        x = self._first.store(rows, last)
        self._waiting.put(x)
        return x

    def advance(self, last: bool) -> Tensor:
        rows = self._first.convolve()
        if rows.shape[1] == 0 and not last:
            return rows
        rows = self._second.push(rows, last).relu_()
        if rows.shape[1] == 0:
            return rows
        return self._waiting.add_to(_products([rows], self._weight, self._bias)).relu_()


class _CascadeRows:
    """After each step, everything before it and its result are fused."""

    def __init__(self, steps: Sequence[_Step], fusions: Sequence[_Fusion]) -> None:
        self._steps = steps
        self._fusions = fusions
        self._waiting = [[RowQueue() for _ in range(i + 1)] for i in range(len(steps))]
        self._x: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """As :class:`RowStream` has it."""
        self.store(rows, last)
        return self.advance(last)

    def store(self, rows: Tensor, last: bool) -> Tensor:
        """See :class:`_Step`."""
        self._x = self._steps[0].store(rows, last)
        return self._x

    def advance(self, last: bool) -> Tensor:
        """See :class:`_Step`."""
        assert self._x is not None
        parts: list[list[Tensor]] = [[self._x]]
        fused = None
        for step, fuse, waiting in zip(self._steps, self._fusions, self._waiting, strict=True):
            for queue, pieces in zip(waiting, parts, strict=True):
                for piece in pieces:
                    queue.put(piece)
            if fused is not None:
                step.store(fused, last)
            out = step.advance(last)
            ready = out.shape[1]
            if ready == 0:
                return out
            parts = [*(queue.take(ready) for queue in waiting), [out]]
            fused = fuse(parts)
        assert fused is not None
        return fused.relu_()


def _products(pieces: Sequence[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Rows (B, r, w, C) in pieces, times a matrix, plus a bias."""
    first = pieces[0]
    count = sum(piece.shape[1] for piece in pieces)
    out = first.new_empty(len(first), count, first.shape[2], weight.shape[1])
    for target, piece in aligned(out, pieces):
        for rows, part in zip(target, piece, strict=True):
            affine_into(rows.view(-1, weight.shape[1]), part.flatten(0, 1), weight, bias)
    return out


def _transposed(conv: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = conv.get_parameter("weight").detach(), conv.get_parameter("bias").detach()
    return weight[:, :, 0, 0].t().contiguous(), bias
