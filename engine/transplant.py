"""Weights to begin with, from another network that has the same kind of backbone.

``python -m engine.transplant --weights save/rcan-pcsr-phase0/release.pth \
--config configs/cpu/rcan-x4.yaml --out local/rcan-x4-start.pth``

The backbone is taken over, from PCSR to an original network or the other way; RCAN's may have
fewer blocks to a group than the new one's. All else begins as in any training.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from models.backbones.rcan import RCAN
from utils.checkpoint import (
    check_same_norm,
    load_checkpoint,
    save_checkpoint,
    weights_for_inference,
)
from utils.cli import Parser, run
from utils.config import load_config
from utils.errors import UserError
from utils.output_words import add_new_weights_word

# Where PCSR keeps its backbone, in specs and in state dicts.
_SPEC, _PREFIX = "encoder_spec", "encoder."


def transplanted(
    spec: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: str | Path,
    data_norm: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The model that `spec` describes, new but for the backbone, which is the one in `state`.

    Args:
        spec: ``{name, args}`` of an original network or of PCSR.
        state: state dict of either.
        source: what to call `state` in errors.
        data_norm: the new model's; None for its backbone's default.

    Raises:
        UserError: the backbones differ in more than the number of RCAN's blocks, or in what their
            inputs are normalised with.
    """
    model = models.make(spec, data_norm=data_norm)
    args = spec.get("args") or {}
    prefix = _PREFIX if _SPEC in args else ""
    own_spec = args.get(_SPEC, spec)
    own_args = own_spec.get("args") or {}
    backbone = models.make({**own_spec, "args": {**own_args, "no_upsampling": True}})
    theirs = {
        key.removeprefix("module.").removeprefix(_PREFIX): value for key, value in state.items()
    }
    if isinstance(backbone, RCAN):
        theirs = backbone.deepened(theirs)
    for key, value in backbone.state_dict().items():
        if key not in theirs:
            raise UserError(f"checkpoint {source} is of another backbone: it has no {key}")
        if theirs[key].shape != value.shape:
            raise UserError(
                f"checkpoint {source} is of another backbone: its {key} is "
                f"{tuple(theirs[key].shape)} instead of {tuple(value.shape)}"
            )
    check_same_norm(model, state, source)
    taken = {f"{prefix}{key}": theirs[key] for key in backbone.state_dict()}
    model.load_state_dict(taken, strict=False)
    return model


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = Parser(
        description="Make weights to begin with (train.py --init) whose backbone is that of "
        "another network: an original one's from PCSR, or the other way.",
        example="python -m engine.transplant --weights save/rcan-pcsr-phase0/release.pth "
        "--config configs/cpu/rcan-x4.yaml --out local/rcan-x4-start.pth",
    )
    parser.add_argument(
        "--weights", required=True, type=Path, metavar="PTH", help="Whose backbone to take."
    )
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="Config of the model to begin with."
    )
    add_new_weights_word(parser)
    args = parser.parse_args()
    config = load_config(args.config)
    if config.seed is not None:
        torch.manual_seed(config.seed)
    state = weights_for_inference(load_checkpoint(args.weights))
    model = transplanted(config.model, state, args.weights, config.data_norm)
    save_checkpoint(args.out, {"model": {**config.model, "sd": model.state_dict()}, "iter": 0})
    print(f"{args.out}: {config.model['name']} with the backbone of {args.weights}")


if __name__ == "__main__":
    run(main)
