"""python -m benchmarks.results measure render: what `make results` runs."""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.results.pages import render
from benchmarks.results.pictures import draw_crops
from benchmarks.results.quality import measure_bicubic, measure_subject
from benchmarks.results.speed import measure_speed
from benchmarks.results.subjects import SETS, SUBJECTS, Subject, chosen, stale_files
from benchmarks.results.target import target_text
from utils.allocator import keep_freed_blocks
from utils.cli import (
    EXIT_USER_ERROR,
    Parser,
    add_device_words,
    check_device_words,
    one_line,
    positive_int,
    run,
)
from utils.device import pick_device
from utils.errors import UserError
from utils.log import set_up


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m benchmarks.results",
        description="Measure the released weights into JSON files in results/figures, and render "
        "results/README.md, LESSONS.md and the model cards from these files. Rendering alone "
        "takes seconds.",
        example="python -m benchmarks.results measure render --data load/benchmark --models carn",
    )
    parser.add_argument(
        "steps",
        nargs="+",
        choices=("measure", "render"),
        metavar="measure|render",
        help="In order.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("load/benchmark"),
        metavar="DIR",
        help="Folder with Set5/HR, Set14/HR and BSD100/HR.",
    )
    parser.add_argument(
        "--official",
        type=Path,
        metavar="DIR",
        help="Folder with the official carn-x4.pth and carn-pcsr-phase1.pth. Without it their "
        "figures stay as they are.",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        metavar="NAME",
        help=f"Measure only these: {', '.join(subject.name for subject in SUBJECTS)}. Those "
        "without weights are left out.",
    )
    parser.add_argument(
        "--sets", nargs="*", choices=SETS, default=SETS, metavar="SET", help=", ".join(SETS) + "."
    )
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=("quality", "speed", "pictures"),
        default=("quality", "speed", "pictures"),
        metavar="PART",
        help="quality, speed, pictures.",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, metavar="N", help="Of timing, after a warm-up."
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="Of a CPU. Default: PyTorch's choice."
    )
    add_device_words(parser)
    return parser


def main() -> int:
    """Parse the command line; measure, render. A subject that fails does not keep the others."""
    args = make_parser().parse_args()
    check_device_words(args)
    set_up()
    keep_freed_blocks()
    failed = _measure(args) if "measure" in args.steps else []
    if "render" in args.steps:
        for path in render():
            print(path)
        print(target_text())
        for path in stale_files():
            print(
                f"warning: {path.name} is of other weights than those in save/: measure it again",
                file=sys.stderr,
            )
    if failed:
        print(f"error: not measured: {'; '.join(failed)}", file=sys.stderr)
    return EXIT_USER_ERROR if failed else 0


def _measure(args: argparse.Namespace) -> list[str]:
    """Measure what was asked for. Returns the subjects that failed, and why."""
    if not args.data.is_dir():
        raise UserError(f"--data {args.data} is no folder: name that of the benchmark sets")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device, args.gpu)
    subjects = chosen(args.models)
    if "quality" in args.parts:
        measure_bicubic(args.data, args.sets, device)
    failed = []
    for subject in subjects:
        weights = subject.weights(args.official)
        if weights[1] is None and subject.is_official and args.official is not None:
            failed.append(f"{subject.name}: --official {args.official} has no {subject.pcsr}.pth")
            continue
        if weights[1] is None:
            print(f"{subject.name}: no weights of {subject.pcsr}, left out", flush=True)
            continue
        start_s = time.perf_counter()
        try:
            _measure_one(args, subject, weights, device)
        except UserError as error:
            failed.append(f"{subject.name}: {one_line(error)}")
        print(f"{subject.name}: {time.perf_counter() - start_s:.0f} s", flush=True)
    return failed


def _measure_one(
    args: argparse.Namespace,
    subject: Subject,
    weights: tuple[Path | None, Path | None],
    device: torch.device,
) -> None:
    if "quality" in args.parts:
        measure_subject(subject, weights, args.data, args.sets, device)
    if "speed" in args.parts:
        measure_speed(subject, weights, args.data, device, args.rounds)
    # The official networks' pictures are not ours to show.
    if "pictures" in args.parts and not subject.is_official:
        draw_crops(subject, weights, device)


if __name__ == "__main__":
    run(main)
