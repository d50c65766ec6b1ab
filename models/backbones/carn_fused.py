"""CARN's encoder for inference: the same function in the order of memory.

Activations are pixel-major, (Q, C) with Q = B h w pixels, which channels-last convolutions read as
they are. The 1x1 convolutions are matrix products; those on a concatenation are sums of products,
so nothing is concatenated. Batch norm is folded beforehand.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FusedCarn(nn.Module):
    """The features of a CARN whose batch norm is folded.

    Args:
        carn: a `models.backbones.carn.CARN`; its weights are copied.
    """

    def __init__(self, carn: nn.Module) -> None:
        super().__init__()
        self.entry = _channels_last(carn.get_submodule("entry"))
        self.blocks = [_Block(carn.get_submodule(name)) for name in ("b1", "b2", "b3")]
        self.fusions = [_Fusion(carn.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised to features (B, C, h, w), channels-last in memory."""
        entry = F.conv2d(x.contiguous(memory_format=torch.channels_last), *self.entry, padding=1)
        batch, _, h, w = entry.shape
        steps = [lambda y_QC, block=block: block(y_QC, (batch, h, w)) for block in self.blocks]
        out_QC = _cascade(_pixels(entry), steps, self.fusions)
        return out_QC.view(batch, h, w, -1).permute(0, 3, 1, 2)


class _Block:
    """A cascade of three times the same residual block."""

    def __init__(self, block: nn.Module) -> None:
        body = block.get_submodule("b1.body")
        first, second, self.pointwise = (body.get_submodule(i) for i in ("0", "2", "4"))
        self.convs = [_channels_last(first), _channels_last(second)]
        self.groups: int = first.groups  # type: ignore[assignment]
        self.weight, self.bias = _transposed(self.pointwise)
        self.fusions = [_Fusion(block.get_submodule(name)) for name in ("c1", "c2", "c3")]

    def __call__(self, x_QC: Tensor, shape: tuple[int, int, int]) -> Tensor:
        return _cascade(x_QC, [lambda y_QC: self._residual(y_QC, shape)] * 3, self.fusions)

    def _residual(self, x_QC: Tensor, shape: tuple[int, int, int]) -> Tensor:
        y = x_QC.view(*shape, -1).permute(0, 3, 1, 2)
        for weight, bias in self.convs:
            y = F.conv2d(y, weight, bias, padding=1, groups=self.groups).relu_()
        return torch.addmm(x_QC, _pixels(y), self.weight).add_(self.bias).relu_()


class _Fusion:
    """1x1 convolution on a concatenation, then ReLU: one product per part."""

    def __init__(self, fusion: nn.Module) -> None:
        weight, self.bias = _transposed(fusion.get_submodule("0"))
        self.weights = [part.contiguous() for part in weight.split(weight.shape[1])]

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        out_QC = torch.addmm(self.bias, parts[0], self.weights[0])
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            out_QC.addmm_(part, weight)
        return out_QC.relu_()


def _cascade(
    x_QC: Tensor, steps: Sequence[Callable[[Tensor], Tensor]], fusions: Sequence[_Fusion]
) -> Tensor:
    parts, out_QC = [x_QC], x_QC
    for step, fuse in zip(steps, fusions, strict=True):
        parts.append(step(out_QC))
        out_QC = fuse(parts)
    return out_QC


def _pixels(x: Tensor) -> Tensor:
    """(B, C, h, w), channels-last in memory, to (Q, C) without copying."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _channels_last(conv: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = conv.get_parameter("weight").detach(), conv.get_parameter("bias").detach()
    return weight.contiguous(memory_format=torch.channels_last), bias


def _transposed(conv: nn.Module) -> tuple[Tensor, Tensor]:
    weight, bias = conv.get_parameter("weight").detach(), conv.get_parameter("bias").detach()
    return weight[:, :, 0, 0].t().contiguous(), bias
