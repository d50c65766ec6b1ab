"""ReLU units that are never above zero: found, counted, and given new weights.

Such a unit passes nothing on and gets no gradient, so that it stays as it is: part of the network
is lost for good ("dying ReLU"; Lu et al., Communications in Computational Physics, 2020). Given new
incoming weights, and zeros as outgoing ones, it starts anew while the network's output is as it
was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Layer = nn.Conv2d | nn.Linear
# A new unit may happen to be below zero everywhere, too.
_MOST_ROUNDS = 4


@dataclass(frozen=True)
class ReluLayer:
    """Units that a ReLU is applied to, and all that reads them.

    Attributes:
        producer: makes them; its rows of weights are theirs.
        observed: the module whose output has their signs, channels along `axis`.
        readers: each with the input channel at which it reads the first unit.
    """

    producer: Layer
    observed: nn.Module
    readers: tuple[tuple[Layer, int], ...]

    @property
    def axis(self) -> int:
        """Of the channels."""
        return 1 if isinstance(self.producer, nn.Conv2d) else -1

    @property
    def is_trained(self) -> bool:
        """Whether all that makes and reads them is."""
        touched = [self.producer, *(reader for reader, _ in self.readers)]
        return all(weight.requires_grad for one in touched for weight in one.parameters())


@runtime_checkable
class HasReluLayers(Protocol):
    """A module whose ReLUs are not all between neighbours of an ``nn.Sequential``."""

    def relu_layers(self) -> Sequence[ReluLayer]:
        """Those that are its own, by the names under which they are told."""


def relu_layers(network: nn.Module) -> dict[str, ReluLayer]:
    """The hidden layers: all whose readers are known, by the names of their producers.

    Not among them are units with batch norm before their ReLU, those whose pixels are shuffled
    before the next layer, and those of PReLU, which cannot die.
    """
    found = {}
    names = {module: name for name, module in network.named_modules()}
    for module in network.modules():
        own = list(module.relu_layers()) if isinstance(module, HasReluLayers) else []
        if isinstance(module, nn.Sequential):
            own += _between_neighbours(module)
        found.update({names[layer.producer]: layer for layer in own})
    return {name: found[name] for name in names.values() if name in found}


def _between_neighbours(layers: nn.Sequential) -> Iterator[ReluLayer]:
    for (producer, relu), (_, reader) in pairwise(pairwise(layers)):
        if isinstance(producer, Layer) and isinstance(relu, nn.ReLU) and isinstance(reader, Layer):
            yield ReluLayer(producer, producer, ((reader, 0),))


def dead_units(network: nn.Module, run: Callable[[], None]) -> dict[str, Tensor]:
    """Which units are never above zero while `run` runs the network.

    Returns:
        of each of :func:`relu_layers` that ran, (units,) bool on the CPU. Units with NaN count as
        alive.
    """
    layers = relu_layers(network)
    highest: dict[str, Tensor] = {}
    with torch.no_grad(), _observed(layers, highest):
        run()
    return {name: (highest[name] <= 0).cpu() for name in layers if name in highest}


@contextmanager
def _observed(layers: dict[str, ReluLayer], highest: dict[str, Tensor]) -> Iterator[None]:
    """Keep the highest value of each unit."""

    def hook(name: str, axis: int) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            others = [dim for dim in range(output.dim()) if dim != axis % output.dim()]
            seen = output.detach().amax(others)
            highest[name] = seen if name not in highest else torch.maximum(highest[name], seen)

        return keep

    handles = [
        layer.observed.register_forward_hook(hook(name, layer.axis))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def revive(
    network: nn.Module, find: Callable[[], Mapping[str, Tensor]], *, seed: int = 0
) -> dict[str, Tensor]:
    """Give dead units new weights, in place; what the network makes of inputs stays.

    A unit's incoming weights are drawn from a normal distribution, at the length that those of the
    living units of its layer have in the middle; its bias is zero. What reads it starts with zeros.
    Units still dead after that are drawn again, up to four times.

    Args:
        find: :func:`dead_units` of the network as it is then, of some layers or all.

    Returns:
        what `find` found at first: the units that are new now.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = relu_layers(network)
    new = dead = dict(find())
    # That of the units that lived at first, also in later rounds.
    lengths = {name: _length(layers[name].producer.weight[~units]) for name, units in dead.items()}
    for _ in range(_MOST_ROUNDS):
        if not any(units.any() for units in dead.values()):
            break
        for name, units in dead.items():
            _draw(layers[name], units.nonzero().flatten().tolist(), lengths[name], generator)
        now = find()
        dead = {name: units & now[name] for name, units in dead.items()}
    return new


def _length(rows: Tensor) -> float:
    """The median norm; that of He's initialisation where there are none."""
    return float(rows.flatten(1).norm(dim=1).median()) if len(rows) else 2.0**0.5


def _draw(layer: ReluLayer, units: list[int], length: float, generator: torch.Generator) -> None:
    weight = layer.producer.weight
    for unit in units:
        row = torch.randn(weight.shape[1:], generator=generator)
        weight[unit] = (row * (length / row.norm())).to(weight)
        if layer.producer.bias is not None:
            layer.producer.bias[unit] = 0.0
        for reader, first in layer.readers:
            _forget(reader, first + unit)


def _forget(reader: Layer, channel: int) -> None:
    """Zeros where a layer reads an input channel."""
    if isinstance(reader, nn.Linear):
        reader.weight[:, channel] = 0.0
        return
    of_group = reader.in_channels // reader.groups
    group, index = divmod(channel, of_group)
    rows = reader.out_channels // reader.groups
    reader.weight[group * rows : (group + 1) * rows, index] = 0.0
