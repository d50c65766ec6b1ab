"""Time, FLOPs and memory of super-resolution, PCSR against its original network.

All cases of one size run in turn, in one process, so that what slows the machine down for a while
slows down all alike: ratios hold where absolute times do not.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import plots
from benchmarks.cases import (
    BACKBONES,
    FP32_VARIANTS,
    VARIANTS,
    Size,
    Source,
    backbone_of,
    cases_of,
    is_pcsr,
    lr_size,
    make_routing,
)
from benchmarks.measure import Bench, product_peak
from benchmarks.report import LEGEND, Row, growth_table
from engine.budget import OriginalCost
from engine.inference_words import add_json_word
from utils.allocator import keep_freed_blocks
from utils.atomic import write_text
from utils.cli import (
    EXIT_USER_ERROR,
    Parser,
    add_device_words,
    check_device_words,
    positive_int,
    run,
)
from utils.device import pick_device, resolve_precision
from utils.errors import UserError
from utils.log import set_up
from utils.machine import describe
from utils.output_words import png_file

SIZES = ("420x276", "480x270", "960x540", "1920x1080")
ROUTINGS = ("k0", "k1", "adm", "heavy", "light", "budget:0.7")
PRECISIONS = ("fp32", "bf16", "fp16", "auto")
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_MEMORY = {
    True: "peak of a process that does nothing else (CPU: resident, libraries included)",
    False: "not measured (--no_memory)",
}


def parse_arguments() -> argparse.Namespace:
    """The command line; nothing is twice in a list."""
    parser = Parser(
        description="Measure PCSR and its original networks at x4: time, FLOPs in both "
        "conventions, FLOPs per second against the device's peak, memory, and the ratios. All "
        "cases of one backbone and size run in turn. Lists may be given as several words or with "
        "commas.",
        example="python -m benchmarks.inference --backbone carn --size 420x276 960x540 "
        "--threads 2 --json results/tmp/carn.json",
    )
    _add_choices(parser)
    _add_networks(parser)
    _add_measuring(parser)
    add_device_words(parser)
    args = parser.parse_args()
    for word in ("backbone", "size", "variants", "routing", "precision"):
        setattr(args, word, list(dict.fromkeys(_flat(getattr(args, word) or ()))))
    return args


def _add_choices(parser: Parser) -> None:
    def add(word: str, convert: Callable[[str], Any], default: str | None, text: str) -> None:
        parser.add_argument(
            word, nargs="+", type=_listed(convert), default=default, metavar="WORD", help=text
        )

    add("--backbone", _one_of(BACKBONES), "carn", f"{', '.join(BACKBONES)}, or all.")
    add(
        "--size",
        _size,
        SIZES[0],
        "LR sizes, WIDTHxHEIGHT (420x276 has 276 rows of 420 pixels); all: "
        f"{', '.join(SIZES)}. Large ones take minutes a round, and originals at 1920x1080 up to "
        "tens of GB.",
    )
    add(
        "--variants",
        _one_of(VARIANTS),
        ",".join(VARIANTS),
        "original: the network as published, original_optimized: with the graph optimisations "
        "that PCSR's fast engine has; reference, fast: PCSR's engines. original and reference "
        "run in fp32, whatever --precision says.",
    )
    add(
        "--routing",
        _routing,
        None,
        "k0, k1 (any k), adm, heavy, light, budget:X (X as test_pcsr.py's --budget takes it) or "
        "share:X (that share of the pixels to the heavy upsampler). Default: "
        f"{', '.join(ROUTINGS)}, where that budget can be kept.",
    )
    add("--precision", _one_of(PRECISIONS), "fp32", "fp32, bf16, fp16 or auto.")


def _add_networks(parser: Parser) -> None:
    for word, network in (("--weights", "PCSR"), ("--original_weights", "original")):
        parser.add_argument(
            word,
            nargs="+",
            type=Path,
            default=[],
            metavar="PATH",
            help=f"Checkpoints of {network} networks, at most one for each backbone. Default: "
            "those in save/; where there are none, untrained weights, which cost the same but "
            "for the share of hard pixels.",
        )


def _add_measuring(parser: Parser) -> None:
    parser.add_argument(
        "--rounds", type=positive_int, default=7, metavar="N", help="After one to warm up."
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="Threads of a CPU. Default: PyTorch's choice.",
    )
    parser.add_argument(
        "--no_memory",
        action="store_true",
        help="Do not measure peak memory, for which every case runs once in a process of its own.",
    )
    add_json_word(parser)
    parser.add_argument(
        "--plot",
        type=png_file,
        metavar="PNG",
        help="Also plot PSNR against executed FLOPs and against time, on --hr_data; the figures "
        "go to a JSON file of the same name.",
    )
    parser.add_argument(
        "--hr_data", type=Path, metavar="DIR", help="Folder of HR images for --plot."
    )


def main() -> int:
    """Parse the command line, measure, print tables, write files.

    Returns:
        the exit code: 2 where a case that was asked for could not be run.
    """
    args = parse_arguments()
    _check(args)
    set_up()
    if not set(args.variants) & set(FP32_VARIANTS):
        # As the scripts do. What is measured as published has the C library's usual memory, and
        # then so has all that is compared with it.
        keep_freed_blocks()
    device = pick_device(args.device, args.gpu)
    if args.threads:
        torch.set_num_threads(args.threads)
    precisions = dict.fromkeys(_NAMES[resolve_precision(word, device)] for word in args.precision)
    sources = [Source.find(each, args.weights, args.original_weights) for each in args.backbone]
    print("\n".join(source.describe() for source in sources))
    peaks = {
        name: product_peak(device, dtype)
        for dtype, name in _NAMES.items()
        if name in {"fp32", *precisions}
    }
    print(_machine_line(device, peaks), flush=True)
    routings = args.routing or ROUTINGS
    optional = [] if args.routing else [each for each in ROUTINGS if each.startswith("budget:")]
    rows: list[Row] = []
    left_out = 0
    for shape in args.size:
        for source in sources:
            cases = cases_of(source.backbone, args.variants, routings, list(precisions))
            bench = Bench(source, device, shape, peaks, memory=not args.no_memory)
            rows += bench.run(cases, args.rounds, optional)
            left_out += bench.left_out
            if args.json is not None:
                _write_json(args.json, rows)
    if not rows:
        raise UserError("nothing could be run: see the lines above")
    if len(args.size) > 1:
        print(f"\ntime per LR pixel, in us\n{growth_table(rows)}")
    print("\n" + LEGEND.format(memory=_MEMORY[not args.no_memory]), flush=True)
    if args.plot is not None:
        plots.measure_and_plot(sources, args.hr_data, args.plot, device, args.rounds)
    if left_out:
        print(f"error: {left_out} of the cases were left out, see above", file=sys.stderr)
    return EXIT_USER_ERROR if left_out else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse words that do not go together, before anything is measured."""
    check_device_words(args)
    if (args.plot is None) != (args.hr_data is None):
        raise UserError("--plot and --hr_data go together: PSNR needs pictures to compare with")
    if args.plot is not None:
        plots.check(args.plot, args.json)
    for paths, wanted in ((args.weights, True), (args.original_weights, False)):
        for path in paths:
            if is_pcsr(path) != wanted:
                kinds = ("PCSR", "an original network")
                one, other = kinds if is_pcsr(path) else kinds[::-1]
                raise UserError(f"checkpoint {path} is of {one}, not of {other}")
        backbones = [backbone_of(path) for path in paths]
        for path, backbone in zip(paths, backbones, strict=True):
            if backbone not in args.backbone:
                raise UserError(f"checkpoint {path} is of `{backbone}`: name it with --backbone")
            if backbones.count(backbone) > 1:
                raise UserError(f"several checkpoints of `{backbone}` are given, {path} for one")


def _machine_line(device: torch.device, peaks: dict[str, float]) -> str:
    facts = describe(device)
    products = ", ".join(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items())
    return (
        f"{facts['device_name']} ({device}, {facts['torch_threads']} threads), "
        f"torch {facts['torch']}; best product of two matrices: {products}"
    )


def _write_json(path: Path, rows: Sequence[Row]) -> None:
    content = [dataclasses.asdict(row) for row in rows]
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _listed(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """`type=` of an option that takes several words, or one with commas."""

    def of_words(text: str) -> list[Any]:
        return list(_flat(convert(word) for word in text.split(",")))

    return of_words


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        yield from value if isinstance(value, list) else [value]


def _one_of(names: Sequence[str]) -> Callable[[str], str | list[str]]:
    def convert(text: str) -> str | list[str]:
        if text == "all":
            return list(names)
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected {', '.join(names)} or all, not `{text}`")
        return text

    return convert


def _size(text: str) -> Size | list[Size]:
    return [lr_size(size) for size in SIZES] if text == "all" else lr_size(text)


def _routing(text: str) -> str:
    try:
        make_routing(text, OriginalCost("carn"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


if __name__ == "__main__":
    run(main)
