"""Dead ReLU units of a network, looked for with its training data; and new weights for them.

``python -m engine.dead_units --config configs/carn-x4.yaml``

See `models.dead_units` for what they are. Training does the same at the iterations that a config's
`revive` names.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.data import Batch, TrainBatches
from engine.inference_words import add_weights_word, output_file
from engine.loading import load_model
from models.dead_units import dead_units, relu_layers, revive
from models.grid import PixelGrid
from models.pcsr import PCSR
from utils.checkpoint import find_weights, load_checkpoint, save_checkpoint
from utils.cli import (
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    positive_int,
    run,
)
from utils.config import Config, load_config
from utils.distributed import World, max_over_ranks, world
from utils.errors import UserError
from utils.log import set_up

# Patches that a unit has to be silent on; and where no more hangs on it than a line in a log.
PATCHES = 512
HINT_PATCHES = 64
# Output pixels of a batch that the upsamplers are tried on.
_PIXELS = 1024
_NAMED = 3


class Probe:
    """Looks for a network's dead units on the same training samples every time.

    Args:
        network: an original network or a PCSR network; on the device of the samples.
        batches: of the samples, this rank's part.
        trained_only: leave out layers that are frozen, or whose readers are.
    """

    def __init__(
        self, network: nn.Module, batches: Iterable[Batch], *, trained_only: bool = False
    ) -> None:
        device = next(network.parameters()).device
        self._network = network
        self._trained_only = trained_only
        self._samples = [
            (b["lr"].to(device), (b["hr"].shape[-2], b["hr"].shape[-1])) for b in batches
        ]

    def dead_units(self) -> dict[str, Tensor]:
        """`models.dead_units.dead_units` over all ranks, each of which has to call it."""
        was_training = self._network.training
        # Statistics of batch norm are neither taken from the samples nor changed by them.
        self._network.eval()
        try:
            found = dead_units(self._network, self._run)
        finally:
            self._network.train(was_training)
        if self._trained_only:
            layers = relu_layers(self._network)
            found = {name: units for name, units in found.items() if layers[name].is_trained}
        alive = [int(flag) for units in found.values() for flag in ~units]
        dead = ~torch.tensor(max_over_ranks(alive), dtype=torch.bool)
        lengths = [len(units) for units in found.values()]
        return dict(zip(found, dead.split(lengths), strict=True))

    def revive(self, seed: int) -> dict[str, Tensor]:
        """`models.dead_units.revive`."""
        return revive(self._network, self.dead_units, seed=seed)

    def _run(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for lr, size in self._samples:
            if isinstance(self._network, PCSR):
                _run_everywhere(self._network, lr, size, generator)
            else:
                self._network(lr)


def _run_everywhere(
    model: PCSR, lr: Tensor, size: tuple[int, int], generator: torch.Generator
) -> None:
    """Every upsampler and the classifier, on some of the output pixels."""
    feat = model.encode(lr)
    grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
    pixels = torch.randperm(size[0] * size[1], generator=generator)[:_PIXELS].to(lr.device)
    for sampler in (*model.upsamplers, *([model.classifier] if model.classifier else [])):
        sampler(feat, grid, pixels)


def told(found: Mapping[str, Tensor]) -> str:
    """Such as ``5 of 960 (b1.b1.body.0 4, b2.b1.body.0 1)``."""
    counts = sorted(((int(u.sum()), n) for n, u in found.items() if u.any()), key=lambda c: -c[0])
    named = [f"{name} {count}" for count, name in counts[:_NAMED]]
    if len(counts) > _NAMED:
        named.append(f"{len(counts) - _NAMED} more layers")
    return _count(found) + (f" ({', '.join(named)})" if named else "")


def _count(found: Mapping[str, Tensor]) -> str:
    dead = sum(int(units.sum()) for units in found.values())
    return f"{dead} of {sum(map(len, found.values()))}"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Count a network's dead ReLU units, layer by layer: those that are never above "
        "zero on training samples. They pass nothing on and learn nothing. With --output, they get "
        "new weights, and training that starts from these (--init) makes use of them.",
        example="python -m engine.dead_units --config configs/carn-x4.yaml",
    )
    add_config_words(parser)
    add_weights_word(parser)
    add_device_words(parser)
    parser.add_argument(
        "--output",
        type=_weights_file,
        metavar="PATH",
        help="Write the weights with dead units made new: random incoming weights, zeros as "
        "outgoing ones, so that the network's output stays.",
    )
    parser.add_argument(
        "--patches",
        type=positive_int,
        default=PATCHES,
        metavar="N",
        help=f"Training patches to look at, in whole batches. Default: {PATCHES}.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="Of samples and new weights. Default: 0."
    )
    return parser.parse_args()


def main() -> None:
    """Parse the command line, look, and print; write where asked to."""
    args = parse_arguments()
    check_device_words(args)
    config = load_config(args.config, args.overrides)
    path = args.weights or find_weights(Path("save") / config.name)
    if args.output is not None and args.output.resolve() == path.resolve():
        raise UserError(f"--output {args.output}: the weights that are looked at would be lost")
    with world(args.device, args.gpu) as current:
        set_up(main=current.is_main)
        network = load_model(path, current.device, config)
        probe, patches = _probe(config, network, args, current)
        found = probe.dead_units() if args.output is None else probe.revive(args.seed)
    for name, units in found.items():
        if units.any():
            print(f"{name:<32} {int(units.sum())} of {len(units)}")
    print(f"{config.name} from {path}: {_count(found)} ReLU units are dead on {patches} patches")
    if args.output is not None:
        _write(args.output, path, config, network)


def _probe(
    config: Config, network: nn.Module, args: argparse.Namespace, world: World
) -> tuple[Probe, int]:
    """With at least as many patches as asked for, and how many these are."""
    data = config.train_dataset
    if data is None:
        raise UserError("config: key `train_dataset` is missing: units are tried on its samples")
    count = -(-args.patches // data.batch_size)
    batches = TrainBatches(data, seed=args.seed, start=0, stop=count, world=world)
    probe = Probe(network, batches.of(0, count))
    if batches.skipped.has_news():
        batches.skipped.report()
    return probe, count * data.batch_size


def _write(output: Path, source: Path, config: Config, network: nn.Module) -> None:
    checkpoint = load_checkpoint(source)
    spec = checkpoint["model"] if "name" in checkpoint["model"] else config.model
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    model = {"name": spec["name"], "args": dict(spec.get("args") or {}), "sd": state}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(output, {"model": model, "iter": checkpoint.get("iter", 0)})
    print(f"{output}: the same with new weights for these: start training from it with --init")


def _weights_file(text: str) -> Path:
    path = output_file(text)
    if path.suffix.lower() != ".pth":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .pth, not `{text}`")
    return path


if __name__ == "__main__":
    run(main)
