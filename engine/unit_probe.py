"""Looks for a network's dead ReLU units on training samples; see `models.dead_units`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from engine.data import Batch
from models.backbones.base import SRNetwork
from models.dead_units import dead_units, relu_layers, revive
from models.grid import PixelGrid
from models.pcsr import PCSR
from utils.distributed import max_over_ranks

# Patches that a unit has to be silent on; and where no more hangs on it than a line in a log.
PATCHES = 512
HINT_PATCHES = 64
# LR pixels to look at, where samples are whole images.
_MOST_PIXELS = 1 << 22
# Output pixels of a batch that upsamplers and classifier are tried on.
_UPSAMPLED_PIXELS = 1024
_NAMED = 3


class Probe:
    """Tries a network on the same training samples every time, in the mode that it is in.

    The upsamplers and the classifier of a PCSR network are tried on 1024 output pixels an image.

    Args:
        network: an original network or a PCSR network.
        batches: of the samples, this rank's part; read as far as 4 million LR pixels.
        trained_only: leave out layers that are frozen, or whose readers are.

    Attributes:
        patches: how many samples there are.
    """

    def __init__(
        self, network: nn.Module, batches: Iterable[Batch], *, trained_only: bool = False
    ) -> None:
        self._network = network
        self._names = {
            name
            for name, layer in relu_layers(network).items()
            if layer.is_trained or not trained_only
        }
        self._samples = list(_samples(batches, network)) if self._names else []
        self.patches = sum(len(lr) for lr, _ in self._samples)

    @torch.no_grad()
    def dead_units(self) -> dict[str, Tensor]:
        """`models.dead_units.dead_units` over all ranks, each of which has to call it."""
        # Statistics of batch norm stay those of training.
        buffers = [buffer.clone() for buffer in self._network.buffers()]
        found = dead_units(self._network, self.run)
        for buffer, value in zip(self._network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        found = {name: units for name, units in found.items() if name in self._names}
        alive = [int(flag) for units in found.values() for flag in ~units]
        dead = ~torch.tensor(max_over_ranks(alive), dtype=torch.bool)
        lengths = [len(units) for units in found.values()]
        return dict(zip(found, dead.split(lengths), strict=True))

    def revive(self, seed: int) -> dict[str, Tensor]:
        """`models.dead_units.revive`. The optimizer keeps what it has had of them."""
        return revive(self._network, self.dead_units, seed=seed)

    def run(self) -> None:
        """Run all that has hidden units on the samples."""
        generator = torch.Generator().manual_seed(0)
        for lr, size in self._samples:
            if isinstance(self._network, PCSR):
                _run_everywhere(self._network, lr, size, generator)
            else:
                # What comes after the features has no hidden units, and is large.
                assert isinstance(self._network, SRNetwork)
                self._network.features(self._network.norm.normalise(lr))


def _samples(
    batches: Iterable[Batch], network: nn.Module
) -> Iterable[tuple[Tensor, tuple[int, int]]]:
    """LR images on the network's device, and the size of HR."""
    device = next(network.parameters()).device
    pixels = 0
    for batch in batches:
        lr, hr = batch["lr"], batch["hr"]
        yield lr.to(device), (hr.shape[-2], hr.shape[-1])
        pixels += lr.numel() // lr.shape[1]
        if pixels >= _MOST_PIXELS:
            return


def _run_everywhere(
    model: PCSR, lr: Tensor, size: tuple[int, int], generator: torch.Generator
) -> None:
    feat = model.encode(lr)
    grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
    pixels = torch.randperm(size[0] * size[1], generator=generator)[:_UPSAMPLED_PIXELS]
    for sampler in (*model.upsamplers, *([model.classifier] if model.classifier else [])):
        sampler(feat, grid, pixels.to(lr.device))


def told(found: Mapping[str, Tensor]) -> str:
    """Such as ``6 of 576 hidden ReLU units: b1.b1.body.0 4, b2.b1.body.0 1, 1 elsewhere``."""
    dead = {name: int(units.sum()) for name, units in found.items() if units.any()}
    worst = sorted(dead, key=lambda name: -dead[name])
    named = [f"{name} {dead[name]}" for name in worst[:_NAMED]]
    if worst[_NAMED:]:
        named.append(f"{sum(dead[name] for name in worst[_NAMED:])} elsewhere")
    return count(found) + (f": {', '.join(named)}" if named else "")


def count(found: Mapping[str, Tensor]) -> str:
    """Such as ``6 of 576 hidden ReLU units``."""
    dead = sum(int(units.sum()) for units in found.values())
    return f"{dead} of {sum(map(len, found.values()))} hidden ReLU units"
