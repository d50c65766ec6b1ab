"""FLOPs in two conventions, which differ by up to ten times: every figure must say which it is.

**paper** (:func:`paper_flops`) is what the published tables of PCSR, ClassSR and ARM count:

- convolutions and linear layers: 2 per multiply-add, bias not counted;
- transposed convolutions: the same with the *output* size, which overstates them by stride^2
  (FSRCNN x4 on 32x32: 468.0 M counted, 49.8 M executed);
- batch norm: 2 per element, PReLU: 1 per element;
- everything else: 0, which covers ReLU, LeakyReLU, sums, PixelShuffle, interpolation, and channel
  attention's pooling, sigmoid and product (its two 1x1 convolutions count, on 1x1 maps).

**executed** (:func:`executed_flops`) is what really runs: 2 per multiply-add of every convolution
and matrix product, from ``torch.utils.flop_counter``.

A PCSR model costs, in the paper convention, its encoder on the LR image, its classifier on *every*
output pixel, and each pixel's upsampler, all MLPs unfactorised; the skip connection, routing and
refinement are free. Patches count apart, overlaps included. (Solved from the published figures:
CARN-PCSR on 60x60 LR at x4 is given as 4.153 G all-heavy; 3600 x 466 440 for the encoder plus
57 600 x 41 588 for the heavy upsampler is 4.0746 G, and 57 600 x 1360 for the classifier makes
4.1530 G.)

Axes: h w LR; M upsamplers.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from models.pcsr import PCSR

# LR size on which the upsamplers' relative costs are defined.
_COST_LR_PX = 16


def paper_flops(module: nn.Module, *inputs: Tensor | Sequence[int]) -> int:
    """FLOPs of one forward pass in the paper convention. Nothing is computed.

    Args:
        module: any module made of the layers above as submodules; left unchanged.
        inputs: tensors, or their shapes.
    """
    module = _on_meta(module)
    total = 0

    def count(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += _paper_rule(layer, output)

    for layer in module.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with torch.no_grad():
        module(*_meta_inputs(inputs))
    return total


def executed_flops(module: nn.Module, *inputs: Tensor | Sequence[int]) -> int:
    """FLOPs that one forward pass executes: 2 per multiply-add. Nothing is computed.

    Takes the same arguments as :func:`paper_flops`.
    """
    module = _on_meta(module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*_meta_inputs(inputs))
    return counter.get_total_flops()


def mlp_flops(mlp: nn.Module) -> int:
    """FLOPs of an MLP's linear layers on one pixel; the two conventions agree here."""
    linears = (layer for layer in mlp.modules() if isinstance(layer, nn.Linear))
    return sum(2 * layer.in_features * layer.out_features for layer in linears)


def nominal_scale(lr_size: tuple[int, int], out_size: tuple[int, int]) -> float:
    """The scale that defines relative costs: the mean of H/h and W/w, rounded to 0.1."""
    return round((out_size[0] / lr_size[0] + out_size[1] / lr_size[1]) / 2, 1)


@dataclass(frozen=True)
class PcsrCost:
    """What a PCSR model costs, part by part. It depends on sizes only, so one per model will do.

    Attributes:
        encoder: the encoder's structure, on the meta device.
        upsampler_flops: per output pixel, light to heavy.
        classifier_flops: per output pixel; 0 where there is no classifier.
    """

    encoder: nn.Module
    upsampler_flops: tuple[int, ...]
    classifier_flops: int
    _encoder_flops: dict[tuple[str, int, int], int] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: "PCSR") -> "PcsrCost":
        """Costs of a model of any phase; its weights are not kept."""
        return cls(
            encoder=_on_meta(model.encoder),
            upsampler_flops=tuple(mlp_flops(sampler) for sampler in model.upsamplers),
            classifier_flops=0 if model.classifier is None else mlp_flops(model.classifier),
        )

    def encoder_paper(self, lr_size: tuple[int, int]) -> int:
        """Paper FLOPs of the encoder on one LR image, or patch, of (h, w)."""
        return self._encoder_count(paper_flops, lr_size)

    def encoder_executed(self, lr_size: tuple[int, int]) -> int:
        """Executed FLOPs of the encoder on one LR image, or patch, of (h, w)."""
        return self._encoder_count(executed_flops, lr_size)

    def log_costs(self, lr_size: tuple[int, int], out_size: tuple[int, int]) -> tuple[float, ...]:
        """Logarithms of the upsamplers' relative costs, light to heavy, for routing.

        Costs are paper FLOPs of encoder and upsampler, without the classifier, on a 16x16 LR
        image at the :func:`nominal_scale` of the sizes, divided by their sum (CARN-PCSR x4:
        0.3188 and 0.6812).
        """
        scale = nominal_scale(lr_size, out_size)
        encoder = self.encoder_paper((_COST_LR_PX, _COST_LR_PX))
        pixels = round(_COST_LR_PX * scale) ** 2
        costs = [encoder + pixels * flops for flops in self.upsampler_flops]
        return tuple(math.log(cost / sum(costs)) for cost in costs)

    def paper_total(
        self, lr_size: tuple[int, int], pixel_counts: Sequence[int], *, patches: int = 1
    ) -> int:
        """Paper FLOPs of an image.

        Args:
            lr_size: (h, w) of the LR image, or of its patches.
            pixel_counts: output pixels of each upsampler, light to heavy, over all patches.
            patches: how many images or patches the encoder ran on.
        """
        return patches * self.encoder_paper(lr_size) + self._pixel_flops(pixel_counts)

    def _pixel_flops(self, pixel_counts: Sequence[int]) -> int:
        upsamplers = zip(self.upsampler_flops, pixel_counts, strict=True)
        classifier = self.classifier_flops * sum(pixel_counts)
        return classifier + sum(flops * count for flops, count in upsamplers)

    def _encoder_count(self, counter: Callable[..., int], lr_size: tuple[int, int]) -> int:
        key = (counter.__name__, *lr_size)
        if key not in self._encoder_flops:
            self._encoder_flops[key] = counter(self.encoder, (1, 3, *lr_size))
        return self._encoder_flops[key]


def _paper_rule(layer: nn.Module, output: Tensor) -> int:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        # The transposed one likewise: every tap at every output position, zeros included.
        taps = math.prod(layer.kernel_size) * layer.in_channels // layer.groups
        return 2 * taps * output.numel()
    if isinstance(layer, nn.Linear):
        return 2 * layer.in_features * output.numel()
    if isinstance(layer, nn.BatchNorm2d):
        return 2 * output.numel()
    return output.numel() if isinstance(layer, nn.PReLU) else 0


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode with tensors on the meta device; no data is copied."""
    twins: dict[int, object] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(twin, requires_grad=False) if is_parameter else twin
    return copy.deepcopy(module, twins).eval()


def _meta_inputs(inputs: Sequence[Tensor | Sequence[int]]) -> list[Tensor]:
    return [
        tensor.to("meta") if isinstance(tensor, Tensor) else torch.empty(*tensor, device="meta")
        for tensor in inputs
    ]
