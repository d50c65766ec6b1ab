"""Training a list of configs in the time there is, in pieces and on any machine.

``python -m engine.train_queue train --minutes 60``; `pack` and `unpack` carry images and runs.
"""

import argparse
import contextlib
import time
from pathlib import Path

from engine.jobs import FAILED, ROOT, Job, train_all
from engine.parts import pack, unpack
from engine.stop import StopSignal
from utils.atomic import new_aside
from utils.cli import EXIT_USER_ERROR, Parser, positive_float, run
from utils.config import load_config
from utils.errors import UserError

BACKBONES = ("fsrcnn", "carn", "srresnet", "rcan")
KINDS = ("x4", "pcsr-phase0", "pcsr-phase1")
MARGIN_S = 60.0


def _jobs(args: argparse.Namespace) -> list[Job]:
    paths = args.configs or [
        ROOT / "configs" / f"{backbone}-{kind}.yaml" for backbone in BACKBONES for kind in KINDS
    ]
    jobs = []
    for path in paths:
        config = load_config(path, args.overrides)
        if config.iter_max < 1:
            raise UserError(f"config: {path}: `iter_max` is missing, or 0")
        # Not where a link leads: its own name says which phase 0 belongs to it.
        jobs.append(Job(path.absolute(), config, (args.save_dir / config.name).resolve()))
    names = [job.config.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--configs: two are called {name}, which is the name of the folder")
    return jobs


def _train_command(args: argparse.Namespace) -> int:
    if args.minutes * 60 <= args.margin:
        raise UserError(
            f"--minutes {args.minutes:g} is no more than the --margin of {args.margin:g} seconds"
        )
    jobs = _jobs(args)
    words = [word for text in args.overrides for word in ("--set", text)]
    words += [word for name in ("device", "gpu") for word in _given(args, name)]
    end_s = time.monotonic() + 60 * args.minutes
    with StopSignal() as stop:
        states = train_all(jobs, end_s, words, args.margin, stop)
    # Where its terminal was closed, there is nowhere to say it.
    with contextlib.suppress(OSError) if stop.number else contextlib.nullcontext():
        print()
        for job in jobs:
            print(job.describe(states[job.config.name]))
    if any(state.startswith(FAILED) for state in states.values()):
        return EXIT_USER_ERROR
    return 128 + stop.number if stop.number else 0


def _given(args: argparse.Namespace, name: str) -> list[str]:
    value = getattr(args, name)
    return [] if value is None else [f"--{name}", value]


def _pack_command(args: argparse.Namespace) -> int:
    parts = pack(args.input, args.output, args.part_mb)
    count = sum(len(part.files) for part in parts)
    total = sum(part.bytes for part in parts)
    print(f"{args.output}: {count} files in {len(parts)} parts, {total / 1e6:.1f} MB")
    return 0


def _unpack_command(args: argparse.Namespace) -> int:
    aside = new_aside(args.output) if args.replace else None
    written, there = unpack(args.input, args.output, aside)
    print(f"{args.output}: {written} files written, {there} were there already")
    if aside is not None and aside.exists():
        print(f"{aside}: the files that they replace")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Train a list of configs within a given time; the same command again goes on "
        "where it stood. Carry images and runs to other machines in parts.",
        example="python -m engine.train_queue train --minutes 60\n"
        "  python -m engine.train_queue pack --part-mb 20 --input load/photos --output parts\n"
        "  python -m engine.train_queue unpack --input parts --output load",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|pack|unpack")
    _add_train(commands)
    _add_parts(commands)
    return parser.parse_args()


def _add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser(
        "train",
        description="Train one config after the other, all GPUs together (./dist.sh). A run whose "
        "time is up saves and goes on at the next call; a finished one gets its release.pth; one "
        "that fails does not keep the others. Phase 1 waits for its phase 0.",
        example="python -m engine.train_queue train --minutes 60 "
        "--configs configs/cpu/carn-x4.yaml",
    )
    train.add_argument(
        "--minutes", type=positive_float, required=True, help="For all of it, saving included."
    )
    train.add_argument(
        "--configs",
        type=Path,
        nargs="+",
        default=[],
        metavar="YAML",
        help="What to train, in this order. Default: original, phase 0 and phase 1 of "
        f"{', '.join(BACKBONES)} in configs/.",
    )
    train.add_argument(
        "--save_dir",
        type=Path,
        default=Path("save"),
        metavar="DIR",
        help="Holds the runs' folders.",
    )
    train.add_argument(
        "--margin",
        type=positive_float,
        default=MARGIN_S,
        metavar="SECONDS",
        help="A run is asked to save and stop so long before the end.",
    )
    train.add_argument("--device", help="As the training scripts take it. Default: the best.")
    train.add_argument("--gpu", metavar="LIST", help="GPUs to use, such as 0,1. Default: all.")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        help="Override one key of every config; may be given several times.",
    )
    train.set_defaults(run=_train_command)


def _add_parts(commands: "argparse._SubParsersAction[Parser]") -> None:
    packing = commands.add_parser(
        "pack",
        description="Write folders into tar files of a bounded size, with a manifest.",
        example="python -m engine.train_queue pack --part-mb 20 --input load/photos --output parts",
    )
    packing.add_argument(
        "--part-mb", type=positive_float, required=True, help="Most of a part, in 10^6 bytes."
    )
    packing.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="Folders: training images, or run folders such as save/carn-x4.",
    )
    packing.add_argument("--output", type=Path, required=True, metavar="DIR", help="For the parts.")
    packing.set_defaults(run=_pack_command)
    unpacking = commands.add_parser(
        "unpack",
        description="Verify parts and write their files. Files that are there stay; if one of them "
        "has other content, nothing is written.",
        example="python -m engine.train_queue unpack --input parts --output load",
    )
    unpacking.add_argument(
        "--input", type=Path, required=True, metavar="DIR", help="Folder of the parts."
    )
    unpacking.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="For the folders that were packed.",
    )
    unpacking.add_argument(
        "--replace",
        action="store_true",
        help="Move files that are there with other content to before-<time>/ in --output, and put "
        "the new ones in their place.",
    )
    unpacking.set_defaults(run=_unpack_command)


def main() -> int:
    """Parse the command line and do it."""
    args = parse_arguments()
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    run(main)
