"""Count a network's dead ReLU units, layer by layer, and give them new weights.

``python -m engine.dead_units --config configs/gpu/carn-x4.yaml``

See `models.dead_units` for what they are. Training does the same before the iterations that a
config's `revive` names.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import nn

from engine.data import Batch, TrainBatches
from engine.inference_words import add_weights_word
from engine.loading import load_model, weights_of
from engine.train_checks import check_scale
from engine.unit_probe import PATCHES, Probe, count
from models.pcsr import PCSR
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import (
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    positive_int,
    run,
)
from utils.config import Config, load_config
from utils.device import pick_device
from utils.distributed import World
from utils.errors import UserError
from utils.log import set_up
from utils.output_words import new_weights_file

_SEED = 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Count a network's dead ReLU units, layer by layer: those that are never above "
        "zero on training samples. They pass nothing on and learn nothing. Looked at are hidden "
        "units: those that the next layers read as they are, without batch norm or PixelShuffle in "
        "between.",
        example="python -m engine.dead_units --config configs/gpu/carn-x4.yaml",
    )
    add_config_words(parser)
    add_weights_word(parser)
    add_device_words(parser)
    parser.add_argument(
        "--output",
        type=new_weights_file,
        metavar="PATH",
        help="Write the weights with dead units made new: random incoming weights, zeros as "
        "outgoing ones, so that the network's output stays. A run that starts from them (--init) "
        "can make use of these units.",
    )
    parser.add_argument(
        "--patches",
        type=positive_int,
        default=PATCHES,
        metavar="N",
        help="Training patches to look at, in whole batches.",
    )
    return parser.parse_args()


def main() -> None:
    """Parse the command line, look, and print; write where asked to."""
    args = parse_arguments()
    check_device_words(args)
    set_up(main=True)
    config = load_config(args.config, args.overrides)
    path = weights_of(config, args.weights)
    network = load_model(path, pick_device(args.device, args.gpu), config)
    if args.output is not None and isinstance(network, PCSR) and network.classifier is not None:
        raise UserError(
            "--output: phase 1 starts from phase 0's weights, so new units in its own are lost: "
            "name the phase 0 config, or set `revive` in that of phase 1"
        )
    probe = Probe(network, _batches(config, network, args))
    found = probe.dead_units() if args.output is None else probe.revive(_SEED)
    for name, units in found.items():
        if units.any():
            print(f"{name:<32} {int(units.sum())} of {len(units)}")
    print(f"{config.name} from {path}: {count(found)} are dead on {probe.patches} patches")
    if args.output is not None:
        if any(units.any() for units in found.values()):
            _write(args.output, path, config, network)
        else:
            print(f"{args.output} is not written: there is nothing to make new")


def _batches(config: Config, network: nn.Module, args: argparse.Namespace) -> Iterator[Batch]:
    """At least as many patches as asked for."""
    if config.train_dataset is None:
        raise UserError("config: key `train_dataset` is missing: units are tried on its samples")
    data = replace(config.train_dataset, num_workers=0)
    world = World(0, 1, next(network.parameters()).device)
    stop = -(-args.patches // data.batch_size)
    batches = TrainBatches(data, seed=_SEED, start=0, stop=stop, world=world)
    for batch in batches:
        check_scale(network, batch)
        yield batch
    if batches.skipped.has_news():
        batches.skipped.report()


def _write(output: Path, source: Path, config: Config, network: nn.Module) -> None:
    checkpoint = load_checkpoint(source)
    spec = checkpoint["model"] if "name" in checkpoint["model"] else config.model
    state = {key: value.cpu() for key, value in network.state_dict().items()}
    model = {"name": spec["name"], "args": dict(spec.get("args") or {}), "sd": state}
    save_checkpoint(output, {"model": model, "iter": checkpoint.get("iter", 0)})
    print(f"{output}: the same with new weights for them, to start training from (--init)")


if __name__ == "__main__":
    run(main)
