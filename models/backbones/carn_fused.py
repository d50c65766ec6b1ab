"""CARN's encoder for inference: the same function in the order of memory.

Activations are pixel-major rows (B, r, w, C), see `models.streams`. The 1x1 convolutions are matrix
products; those on a concatenation are sums of products, so nothing is concatenated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.elementwise import relu_
from models.streams import ChainRows, ConvRows, RowQueue, RowStream, push_whole


class FusedCarn(nn.Module):
    """The features of a CARN whose batch norm is folded.

    Args:
        carn: a `models.backbones.carn.CARN`; its weights are read.
    """

    def __init__(self, carn: nn.Module) -> None:
        super().__init__()
        self.entry: nn.Conv2d = carn.get_submodule("entry")  # type: ignore[assignment]
        self._blocks = [_Block(carn.get_submodule(name)) for name in ("b1", "b2", "b3")]
        self._fusions = [_Fusion(carn.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised to features (B, C, h, w), channels-last in memory."""
        return push_whole(self.stream(), x)

    def stream(self) -> RowStream:
        """See `SRNetwork.stream`."""
        cascade = _CascadeRows([block.stream() for block in self._blocks], self._fusions)
        return ChainRows(ConvRows(self.entry), cascade)


class _Fusion:
    """1x1 convolution on a concatenation, then ReLU: one product per part."""

    def __init__(self, fusion: nn.Module) -> None:
        weight, self._bias = _transposed(fusion.get_submodule("0"))
        self._weights = [part.contiguous() for part in weight.split(weight.shape[1])]

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        out = torch.addmm(self._bias, parts[0].flatten(0, 2), self._weights[0])
        for part, weight in zip(parts[1:], self._weights[1:], strict=True):
            out.addmm_(part.flatten(0, 2), weight)
        return relu_(out).view_as(parts[0])


class _Block:
    """A cascade of three times the same residual block."""

    def __init__(self, block: nn.Module) -> None:
        self._body = block.get_submodule("b1.body")
        self._pointwise = _transposed(self._body.get_submodule("4"))
        self._fusions = [_Fusion(block.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def stream(self) -> RowStream:
        steps = [_ResidualRows(self._body, *self._pointwise) for _ in range(3)]
        return _CascadeRows(steps, self._fusions)


class _ResidualRows:
    """ReLU(body(x) + x)."""

    def __init__(self, body: nn.Module, weight: Tensor, bias: Tensor) -> None:
        self._convs = [ConvRows(body.get_submodule(i)) for i in ("0", "2")]  # type: ignore[arg-type]
        self._weight, self._bias = weight, bias
        self._waiting = RowQueue()

    def push(self, rows: Tensor, last: bool) -> Tensor:
        self._waiting.put(rows)
        for conv in self._convs:
            rows = relu_(conv.push(rows, last))
            if rows.shape[1] == 0:
                return rows
        x = self._waiting.take(rows.shape[1])
        # Equal shapes are summed: adding a row to a matrix is slow in half precision.
        out = torch.addmm(self._bias, rows.flatten(0, 2), self._weight)
        return relu_(out.view_as(x).add_(x))


class _CascadeRows:
    """After each step, everything before it and its result are fused."""

    def __init__(self, steps: Sequence[RowStream], fusions: Sequence[_Fusion]) -> None:
        self._steps = steps
        self._fusions = fusions
        self._waiting = [[RowQueue() for _ in range(i + 1)] for i in range(len(steps))]

    def push(self, rows: Tensor, last: bool) -> Tensor:
        parts, out = [rows], rows
        for step, fuse, waiting in zip(self._steps, self._fusions, self._waiting, strict=True):
            for queue, part in zip(waiting, parts, strict=True):
                queue.put(part)
            out = step.push(out, last)
            ready = out.shape[1]
            if ready == 0:
                return out
            parts = [*(queue.take(ready) for queue in waiting), out]
            out = fuse(parts)
        return out


def _transposed(conv: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = conv.get_parameter("weight").detach(), conv.get_parameter("bias").detach()
    return weight[:, :, 0, 0].t().contiguous(), bias
