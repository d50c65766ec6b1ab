"""The command line of test.py and test_pcsr.py."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from datasets.wrappers import LR_MODES
from engine.conventions import Conventions, LrSource
from engine.evaluation import Evaluation, Figures, Restore, bicubic, mean_of
from engine.inference_words import add_json_word, add_self_ensemble_word, add_weights_word
from engine.loading import weights_of
from engine.report import (
    Table,
    circumstances,
    followed,
    foot,
    psnr_table,
    to_json,
    write_json,
)
from engine.restore import Patches
from engine.samples import EvaluationSet, ImagePaths
from engine.self_ensemble import SelfEnsemble
from engine.sharing import PATIENCE, shared_out
from models.patches import PATCH_BATCH_SIZE
from utils.allocator import keep_freed_blocks
from utils.cli import (
    Parser,
    add_config_words,
    add_device_words,
    check_device_words,
    positive_int,
)
from utils.config import Config, load_config
from utils.distributed import World, gather_objects, together, world
from utils.errors import UserError
from utils.log import set_up
from utils.machine import peak_memory_bytes, reset_peak_memory
from utils.metrics import PsnrType

_log = logging.getLogger(__name__)

# Takes a line of a table.
Write = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: the network, whose parameters are counted.
        restore: runs it.
        scale: HR pixels per LR pixel.
        upsamplers: how many it has; 0 for original networks.
        routing, refinement: see `engine.conventions`.
        sweep: what is done instead of one evaluation; gives JSON content.
    """

    model: nn.Module
    restore: Restore
    scale: float
    upsamplers: int = 0
    routing: str | None = None
    refinement: bool | None = None
    sweep: Callable[[EvaluationSet, World, Write], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Request:
    """What is to be evaluated, as the command line has it.

    Attributes:
        args: its words.
        config: the config, overrides included.
        weights: the checkpoint.
        device: where to run.
        patches: how patches are laid; None for whole images.
    """

    args: argparse.Namespace
    config: Config
    weights: Path
    device: torch.device
    patches: Patches | None


Prepare = Callable[[Request], Subject]


def make_parser(description: str, example: str) -> Parser:
    """Parser with the words that both test scripts know."""
    parser = Parser(description=description, example=example)
    add_config_words(parser)
    parser.add_argument(
        "--hr_data",
        metavar="DIR",
        help="Folder of HR images. Default: that of the config's test_dataset.",
    )
    parser.add_argument(
        "--lr_data",
        metavar="DIR",
        help="Folder of LR images, paired with HR by name (0801.png, 0801x4.png, ...). Default: "
        "LR is made from HR by bicubic.",
    )
    parser.add_argument(
        "--lr_mode",
        choices=LR_MODES,
        help="How LR is made: float, the default, is not rounded, as in the published figures; "
        "uint8 makes the benchmark LR images in circulation.",
    )
    parser.add_argument(
        "--per_image",
        action="store_true",
        help="Run whole images; otherwise overlapping patches, which implies --crop.",
    )
    parser.add_argument(
        "--crop",
        action="store_true",
        help="Crop LR to what patches tile (config: patch_size, step), as the published figures "
        "do.",
    )
    parser.add_argument(
        "--patch_batch_size",
        type=positive_int,
        metavar="N",
        help=f"Patches that go through the network at once. Default: {PATCH_BATCH_SIZE}.",
    )
    parser.add_argument(
        "--psnr_type",
        choices=("rgb", "y"),
        help="Channels of PSNR and SSIM. Default: the config's.",
    )
    parser.add_argument(
        "--all_psnr",
        action="store_true",
        help="Also give the mean PSNR by the other usual conventions (channels, rounding, border), "
        "to find the one behind a figure from elsewhere.",
    )
    add_self_ensemble_word(parser)
    parser.add_argument(
        "--bicubic", action="store_true", help="Also give the figures of bicubic enlargement."
    )
    add_weights_word(parser)
    add_json_word(parser)
    add_device_words(parser)
    return parser


def main(parser: Parser, prepare: Prepare) -> int:
    """Parse the command line, evaluate, print the table, write the JSON file.

    Under torchrun the images are shared out over the ranks, and rank 0 prints and writes.
    """
    args = parser.parse_args()
    check_device_words(args)
    with world(args.device, args.gpu, patience=PATIENCE) as current:
        set_up(main=current.is_main)
        keep_freed_blocks()
        request, subject, images = together(lambda: _load(args, prepare, current.device))
        about = _about(request, subject, images)
        write = _write if current.is_main else _leave_out
        write(_heading(about["model"], current))
        reset_peak_memory(current.device)
        if subject.sweep is not None:
            content = subject.sweep(images, current, write)
        else:
            content = _run(images, subject, current, write, args)
        peaks = gather_objects(peak_memory_bytes(current.device))
        peak = None if None in peaks else max(peaks)
        write(foot(images.conventions, current, peak))
        if args.json is not None and current.is_main:
            content |= circumstances(images.conventions, current, peak)
            write_json(args.json, {**content, **about})
    return 0


def is_pcsr(config: Config) -> bool:
    """Whether the config's model is a PCSR one."""
    return str(config.model.get("name")).startswith("pcsr")


def _load(
    args: argparse.Namespace, prepare: Prepare, device: torch.device
) -> tuple[Request, Subject, EvaluationSet]:
    """All that a wrong word or file can break, before anything is computed."""
    config = load_config(args.config, args.overrides)
    paths = _image_paths(args, config)
    weights = weights_of(config, args.weights)
    request = Request(args, config, weights, device, _patches(args, config))
    subject = prepare(request)
    if args.self_ensemble:
        subject = replace(subject, restore=SelfEnsemble(subject.restore))
    if request.patches is not None:
        _check_scale(request.patches, subject.scale)
    conventions = _conventions(args, config, subject, has_lr=paths.lr is not None)
    return request, subject, EvaluationSet(paths, conventions)


def _about(request: Request, subject: Subject, images: EvaluationSet) -> dict[str, Any]:
    """Which model on which data, in plain values."""
    lr_paths = images.lr_paths
    return {
        "model": {
            "config": request.config.name,
            "weights": str(request.weights),
            "parameters": sum(p.numel() for p in subject.model.parameters()),
        },
        "data": {
            "hr": str(images.hr_paths[0].parent),
            "lr": None if lr_paths is None else str(lr_paths[0].parent),
        },
    }


def _heading(model: dict[str, Any], current: World) -> str:
    processes = f" in {current.size} processes" if current.size > 1 else ""
    return (
        f"{model['config']}: {model['parameters'] / 1e3:.2f}K parameters from {model['weights']}, "
        f"on {current.device}{processes}"
    )


def _run(
    images: EvaluationSet,
    subject: Subject,
    current: World,
    write: Write,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Evaluate all images and print the table; the figures as JSON content."""

    def rows(restore: Restore) -> Iterable[Figures]:
        evaluation = Evaluation(images, restore, current.device, all_psnr=args.all_psnr)
        shared = shared_out(evaluation, images.hr_pixels, current)
        return followed(shared, len(images), current)

    table = Table(images.names, subject.upsamplers, write)
    table.header()
    baseline = []
    if args.bicubic:
        baseline = list(rows(bicubic))
        table.baseline("bicubic", mean_of(baseline))
        table.rule()
    figures = []
    for row in rows(subject.restore):
        table.row(row)
        figures.append(row)
    table.rule()
    mean = mean_of(figures)
    table.row(mean)
    if mean.psnrs is not None:
        table.rule()
        before = {"bicubic": mean_of(baseline).psnrs} if baseline else {}
        write(psnr_table({**before, "network": mean.psnrs}))
    return to_json(figures, baseline)


def _write(line: str) -> None:
    """A line on standard output, above a running progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _leave_out(line: str) -> None:
    """What ranks other than 0 do with a line."""


def _patches(args: argparse.Namespace, config: Config) -> Patches | None:
    if config.step > config.patch_size:
        raise UserError(
            f"config: `step` {config.step} leaves gaps between patches of {config.patch_size}"
        )
    if args.per_image:
        if args.patch_batch_size is not None:
            _log.warning("--patch_batch_size changes nothing: images are run whole (--per_image)")
        return None
    return Patches(config.patch_size, config.step, args.patch_batch_size or PATCH_BATCH_SIZE)


def _check_scale(patches: Patches, scale: float) -> None:
    """Refuse a scale at which patches do not begin and end between output pixels."""
    for length in (patches.size, patches.step):
        if abs(length * scale - round(length * scale)) > 1e-6:
            raise UserError(
                f"scale {scale:g}: patches of {patches.size}, step {patches.step}, are not whole "
                f"numbers of output pixels; use --per_image"
            )


def _conventions(
    args: argparse.Namespace, config: Config, subject: Subject, *, has_lr: bool
) -> Conventions:
    if has_lr and args.lr_mode is not None:
        _log.warning("--lr_mode changes nothing: LR images are given")
    made: LrSource = "bicubic uint8" if args.lr_mode == "uint8" else "bicubic float"
    return Conventions(
        scale=subject.scale,
        psnr_type=cast(PsnrType, args.psnr_type or config.psnr_type),
        lr="given" if has_lr else made,
        crop=args.crop or not args.per_image,
        per_image=args.per_image,
        patch_size=config.patch_size,
        step=config.step,
        routing=subject.routing,
        refinement=subject.refinement,
        self_ensemble=args.self_ensemble,
    )


def _image_paths(args: argparse.Namespace, config: Config) -> ImagePaths:
    """The words' folders, else those of the config's test_dataset."""
    if args.hr_data is not None:
        return ImagePaths.of_folders(args.hr_data, args.lr_data)
    if args.lr_data is not None or config.test_dataset is None:
        raise UserError("name the folder of HR images to evaluate on with --hr_data")
    return ImagePaths.of_config(config.test_dataset)
