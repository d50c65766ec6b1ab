"""The command line of train.py and train_pcsr.py."""

import argparse
from collections.abc import Callable
from pathlib import Path

from engine.start import TrainOptions
from engine.trainer import train
from utils.allocator import keep_freed_blocks
from utils.checkpoint import LAST_NAME
from utils.cli import Parser, add_config_words, add_device_words, check_device_words
from utils.config import Config, load_config
from utils.distributed import is_of_this_launch, together, world
from utils.log import set_up


def make_parser(description: str, example: str) -> Parser:
    """Parser of a training script."""
    parser = Parser(description=description, example=example)
    add_config_words(parser)
    add_device_words(parser)
    parser.add_argument(
        "--save_dir",
        type=Path,
        metavar="DIR",
        help="Folder of the run: checkpoint, log, resolved config. Default: save/<config name>.",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto continues the run in the folder, never starts anew (the run that is there is "
        "kept in before-<time>/), a path continues from that checkpoint.",
    )
    parser.add_argument(
        "--init",
        metavar="PATH",
        help="Weights that a new run starts from; PCSR takes backbone and heaviest upsampler of "
        "them. Default: the config's `init`; else, for phase 1, those of the phase 0 config of the "
        "same name.",
    )
    return parser


def main(parser: Parser, check: Callable[[Config], None]) -> int:
    """Parse the command line and train.

    Args:
        check: raises UserError for configs that belong to the other script.
    """
    args = parser.parse_args()
    check_device_words(args)
    keep_freed_blocks()
    with world(args.device, args.gpu) as current:
        set_up(main=current.is_main)
        config = together(lambda: _load(args, check))
        save_dir = args.save_dir or Path("save") / config.name
        # Started again by torchrun, a run goes on, whatever its first start was told.
        started_again = is_of_this_launch(save_dir / LAST_NAME)
        options = TrainOptions(
            save_dir=save_dir,
            resume="auto" if started_again else args.resume,
            init=args.init,
            started_again=started_again,
        )
        return train(config, options, current)


def _load(args: argparse.Namespace, check: Callable[[Config], None]) -> Config:
    config = load_config(args.config, args.overrides)
    check(config)
    return config
