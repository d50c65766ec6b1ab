"""Samples per second, steps and whole runs of training, against the straightforward code.

All cases of one kind run in turn, in one process, so that what slows the machine down for a while
slows down all alike: ratios hold where absolute times do not.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.cases import BACKBONES
from benchmarks.measure import round_robin
from benchmarks.training_cases import Case, Setting, cut_sub_images, prepared, prepared_run
from benchmarks.training_report import Row, bars_table, figures_table
from datasets.cache import CACHES
from engine.inference_words import add_json_word
from engine.memory import is_lack_of_memory
from utils.atomic import write_text
from utils.cli import (
    Parser,
    add_device_words,
    check_device_words,
    one_line,
    positive_float,
    positive_int,
    run,
)
from utils.device import pick_device, resolve_precision
from utils.errors import UserError
from utils.log import set_up
from utils.machine import describe

WHATS = ("data", "step", "end_to_end")
_MOST_RUNS = 3


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Measure training at x4, 32x32 LR crops: samples per second of the "
        "straightforward pipeline and of ours with each cache, the time of a step in the "
        "reference formulation and in ours, and iterations per second of whole runs.",
        example="python benchmarks/training.py --backbone carn fsrcnn --precision fp32 bf16 "
        "--threads 2 --json results/tmp/training.json",
    )
    _add_choices(parser)
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("datasets/tiny/train"),
        metavar="DIR",
        help="Images, from which sub-images of 128x128 are cut into a temporary folder.",
    )
    parser.add_argument("--batch_size", type=positive_int, default=16, metavar="N", help="Samples.")
    parser.add_argument(
        "--workers",
        type=positive_int,
        nargs="+",
        default=[1],
        metavar="N",
        help="Processes that make samples; 1: the training process itself.",
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=7,
        metavar="N",
        help="After one to warm up; whole runs are repeated at most 3 times.",
    )
    parser.add_argument(
        "--seconds", type=positive_float, default=4.0, metavar="S", help="Of a whole run, about."
    )
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="Threads of a CPU. Default: PyTorch's choice.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        help="Override a key of the networks' configs, such as channels_last=true.",
    )
    add_json_word(parser)
    add_device_words(parser)
    return parser.parse_args()


def _add_choices(parser: Parser) -> None:
    def add(word: str, choices: Sequence[Any], default: list[Any], text: str) -> None:
        parser.add_argument(
            word, nargs="+", choices=choices, type=type(choices[0]), default=default, help=text
        )

    add("--what", WHATS, list(WHATS), "Samples, steps on one batch, whole runs.")
    add("--backbone", BACKBONES, ["carn"], "Networks.")
    add("--phase", (0, 1), [0, 1], "Phases of training.")
    add("--precision", ("fp32", "bf16"), ["fp32"], "Of our step; the reference runs in fp32.")
    compiles = ("none", "default", "graphs", "capture")
    text = "Of our step: torch.compile, the same with its CUDA graphs, a CUDA graph alone."
    add("--compile", compiles, ["none"], text)
    add("--cache", CACHES, list(CACHES), "Of our samples; whole runs take the last.")


def main() -> None:
    """Parse the command line, measure, print tables, write the file."""
    args = parse_arguments()
    check_device_words(args)
    set_up()
    logging.getLogger().setLevel(logging.WARNING)  # runs tell of each step of theirs
    device = pick_device(args.device, args.gpu)
    if args.threads:
        torch.set_num_threads(args.threads)
    has_bf16 = resolve_precision("auto", device) is torch.bfloat16
    machine = {**describe(device), "bf16_units": has_bf16}
    print(_environment(machine), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sub_images = scratch / "sub"
        sub_images.mkdir()
        print(f"{cut_sub_images(args.data, sub_images)} sub-images of {args.data}", flush=True)
        setting = Setting(
            sub_images, scratch, device, args.batch_size, args.seconds, tuple(args.overrides)
        )
        rows = _measured(args, setting, machine)
    if not rows:
        raise UserError("nothing could be run: see the lines above")
    if args.json is not None:
        content = [dataclasses.asdict(row) for row in rows]
        write_text(args.json, json.dumps(content, indent=2, allow_nan=False) + "\n")
    print(f"\n{figures_table(rows)}\n\n{bars_table(rows)}", flush=True)


def _measured(args: argparse.Namespace, setting: Setting, machine: dict[str, Any]) -> list[Row]:
    rows = []
    if "data" in args.what:
        for case, samples_s in _in_turn(_data_cases(args), setting, args.rounds).items():
            rows.append(Row.of(case, machine, 1 / samples_s))
    networks = list(itertools.product(args.backbone, args.phase))
    if "step" in args.what:
        for network in networks:
            cases = _step_cases(args, *network)
            for case, step_s in _in_turn(cases, setting, args.rounds).items():
                found = {"step_s_median": step_s, "iterations_per_s": 1 / step_s}
                rows.append(Row.of(case, machine, setting.batch_size / step_s, **found))
    if "end_to_end" in args.what:
        for network in networks:
            rows += _runs(_run_cases(args, *network), setting, args.rounds, machine)
    return rows


def _data_cases(args: argparse.Namespace) -> Iterator[Case]:
    yield Case("data", "straightforward")
    for cache, processes in itertools.product(args.cache, args.workers):
        if processes == 1 or cache != "device":
            yield Case("data", "ours", cache=cache, processes=processes)


def _step_cases(args: argparse.Namespace, backbone: str, phase: int) -> Iterator[Case]:
    yield Case("step", "reference", backbone, phase, "fp32", "none")
    for precision, mode in itertools.product(args.precision, args.compile):
        yield Case("step", "dense", backbone, phase, precision, mode)


def _run_cases(args: argparse.Namespace, backbone: str, phase: int) -> Iterator[Case]:
    yield Case("end_to_end", "straightforward", backbone, phase, "fp32", "none")
    for precision, mode in itertools.product(args.precision, args.compile):
        yield Case("end_to_end", "ours", backbone, phase, precision, mode, args.cache[-1])


def _in_turn(cases: Iterable[Case], setting: Setting, rounds: int) -> dict[Case, float]:
    """The median of each case that can be run; prints why others cannot."""
    calls: dict[Case, Callable[[], float]] = {}
    for case in cases:
        with _left_out(case):
            calls[case] = prepared(case, setting)
    followed = round_robin(calls, rounds, lambda each: tqdm(each, leave=False, disable=None))
    return {case: statistics.median(times) for case, times in followed.items()}


def _runs(
    cases: Iterable[Case], setting: Setting, rounds: int, machine: dict[str, Any]
) -> Iterator[Row]:
    calls: dict[Case, Callable[[], tuple[float, float]]] = {}
    for case in cases:
        with _left_out(case):
            calls[case] = prepared_run(case, setting)
    found: dict[Case, list[tuple[float, float]]] = {case: [] for case in calls}
    for _ in range(min(rounds, _MOST_RUNS)):
        for case, call in calls.items():
            found[case].append(call())
    for case, results in found.items():
        rate, share = (statistics.median(values) for values in zip(*results, strict=True))
        figures = {"iterations_per_s": rate, "data_share": share}
        yield Row.of(case, machine, rate * setting.batch_size, **figures)


@contextlib.contextmanager
def _left_out(case: Case) -> Iterator[None]:
    """Say why a case cannot be run, and go on with the others."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError) and not is_lack_of_memory(error):
            raise
        print(f"left out: {case}: {one_line(error)}", flush=True)


def _environment(machine: dict[str, Any]) -> str:
    """On one line, what the figures depend on beside the code."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    units = ", bf16 units" if machine["bf16_units"] else ""
    return (
        f"{machine['device_name']} ({machine['device']}), {machine['torch_threads']} threads on "
        f"{machine['usable_cores']} of {machine['logical_cores']} cores (load {load:.1f}), "
        f"{machine['cpu_capability']}{units}, torch {machine['torch']}"
    )


if __name__ == "__main__":
    run(main)
