"""What a backbone does for inference, as a list of sums of convolutions: for engines to run.

Axes: B batch, C channels, h w LR.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU)


@dataclass(frozen=True)
class Sum:
    """One step: ``activation(sum of convolutions + bias + what is added)``.

    All convolutions have an odd kernel size, stride 1 and the padding that keeps the size.

    Attributes:
        sources: the steps it reads, -1 is the image.
        weights: of each source's convolution (C, C' / groups, k, k), float32.
        groups: of all of them.
        bias_C: float32.
        added: a step whose output is added; None for none.
        slope_C: factor of what is below zero: zeros for ReLU, ones for no activation.
    """

    sources: tuple[int, ...]
    weights: tuple[Tensor, ...]
    groups: int
    bias_C: Tensor
    added: int | None
    slope_C: Tensor

    @property
    def radius_px(self) -> int:
        """Of the largest kernel."""
        return max(weight.shape[-1] for weight in self.weights) // 2


class RowGraph:
    """A network of convolutions; the last step is its output, which no other step reads.

    Args:
        channels: of the image.
    """

    IMAGE = -1

    def __init__(self, channels: int = 3) -> None:
        self.channels = channels
        self.steps: list[Sum] = []

    def conv(
        self,
        sources: Sequence[int],
        conv: nn.Module,
        *,
        slope: Tensor | float = 1.0,
        added: int | None = None,
    ) -> int:
        """Add a convolution; returns its step.

        Args:
            sources: what is concatenated: one step, or with one group several.
            conv: an nn.Conv2d, whose weights are read.
            slope: factor of what is below zero, of all channels or (C,) of each.
            added: a step whose output is added before the activation.
        """
        assert isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach().float()
        channels = [self.channels_of(source) for source in sources]
        weights = (weight,) if len(sources) == 1 else weight.split(channels, dim=1)
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().float()
        slope_C = torch.as_tensor(slope, dtype=torch.float32, device=weight.device)
        slope_C = slope_C.expand(len(weight))
        step = Sum(tuple(sources), weights, conv.groups, bias, added, slope_C)
        self.steps.append(step)
        return len(self.steps) - 1

    def channels_of(self, step: int) -> int:
        """Of a step's output; -1 is the image."""
        return self.channels if step == self.IMAGE else len(self.steps[step].bias_C)

    @property
    def most_inputs(self) -> int:
        """Of the groups of all convolutions that are larger than 1x1."""
        weights = [weight for step in self.steps for weight in step.weights]
        return max((w.shape[1] for w in weights if w.shape[-1] > 1), default=0)

    def lags(self) -> list[int]:
        """Of each step: how many rows beyond its own position its output depends on."""
        lags: list[int] = []
        for step in self.steps:
            parts = [
                (0 if source == self.IMAGE else lags[source]) + weight.shape[-1] // 2
                for source, weight in zip(step.sources, step.weights, strict=True)
            ]
            lags.append(max(*parts, 0 if step.added is None else lags[step.added]))
        return lags

    def __call__(self, x: Tensor) -> Tensor:
        """The network itself, in plain torch: (B, 3, h, w) to (B, C, h, w)."""
        outputs: list[Tensor] = []
        for step in self.steps:
            y = step.bias_C[:, None, None]
            for source, weight in zip(step.sources, step.weights, strict=True):
                read = x if source == self.IMAGE else outputs[source]
                y = y + F.conv2d(read, weight, padding=weight.shape[-1] // 2, groups=step.groups)
            if step.added is not None:
                y = y + outputs[step.added]
            outputs.append(torch.where(y < 0, y * step.slope_C[:, None, None], y))
        return outputs[-1]


def sequential_graph(layers: Sequence[nn.Module]) -> RowGraph:
    """Of a plain sequence of convolutions and activations, nested or not.

    Raises:
        TypeError: there is a layer that is neither a convolution nor one of ReLU's kind.
    """
    flat = [m for m in nn.Sequential(*layers).modules() if not isinstance(m, nn.Sequential)]
    graph, last = RowGraph(), RowGraph.IMAGE
    for before, layer, after in zip([None, *flat], flat, [*flat[1:], None], strict=False):
        if isinstance(layer, nn.Conv2d):
            last = graph.conv([last], layer, slope=_slope(after))
        elif not (isinstance(before, nn.Conv2d) and isinstance(layer, _ACTIVATIONS)):
            raise TypeError(
                f"a graph is of convolutions, each with one activation or none: {layer}"
            )
    return graph


def _slope(layer: nn.Module | None) -> Tensor | float:
    """Factor of what is below zero; 1 where it is no activation."""
    if isinstance(layer, nn.PReLU):
        return layer.weight.detach()
    if isinstance(layer, nn.LeakyReLU):
        return layer.negative_slope
    return 0.0 if isinstance(layer, nn.ReLU) else 1.0
