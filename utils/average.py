"""The mean of several runs' weights, which often restores better than each of them.

``python -m utils.average save/carn-x4/release.pth local/other-run.pth --out local/mean.pth``

It is for runs that began with the same trained weights ("model soup", arXiv:2203.05482). Runs from
different random weights have nothing in common that a mean could keep.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import (
    build_model,
    check_same_model,
    load_checkpoint,
    same_norm,
    save_checkpoint,
    weights_for_inference,
)
from utils.cli import Parser, run
from utils.errors import UserError
from utils.output_words import add_new_weights_word

# Buffers that say what the network's values mean: not to be averaged.
_NORM = "norm."


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The mean of checkpoints: ``{"model": {"name", "args", "sd"}, "iter"}``.

    Of averaged weights (`ema`), the averages are taken. The mean is formed in float64; whole
    numbers, and the iteration, are the first checkpoint's.

    Args:
        paths: two checkpoints or more, with the same model spec.

    Raises:
        UserError: one of them cannot be read, is damaged or is of another model.
    """
    first = load_checkpoint(paths[0])
    spec = {key: value for key, value in first["model"].items() if key != "sd"}
    states = []
    for path in paths:
        checkpoint = load_checkpoint(path)
        check_same_model(spec, checkpoint["model"], path)
        model = {**spec, "sd": weights_for_inference(checkpoint)}
        states.append(build_model({"model": model}, path).state_dict())
        for key in (key for key in states[0] if key.startswith(_NORM)):
            if not same_norm(states[0][key], states[-1][key]):
                raise UserError(f"checkpoint {path} has another `data_norm` than {paths[0]}")
    mean = {key: _mean([state[key] for state in states]) for key in states[0]}
    return {"model": {**spec, "sd": mean}, "iter": first.get("iter", 0)}


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[0].dtype)


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = Parser(
        description="Make a checkpoint whose weights are the mean of others'. They must come from "
        "runs that began with the same trained weights.",
        example="python -m utils.average save/carn-x4/release.pth local/other-run.pth "
        "--out local/mean.pth",
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="PTH", help="Two checkpoints or more."
    )
    add_new_weights_word(parser)
    args = parser.parse_args()
    if len(args.checkpoints) < 2:
        parser.error("a mean takes two checkpoints or more")
    checkpoint = average(args.checkpoints)
    save_checkpoint(args.out, checkpoint)
    print(f"{args.out}: the mean of {len(args.checkpoints)} x {checkpoint['model']['name']}")


if __name__ == "__main__":
    run(main)
