"""What demo.py does with its command line."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.budget import OriginalCost
from engine.conventions import Conventions
from engine.demo.compare_job import CompareJob
from engine.demo.enlarge import Enlarger
from engine.demo.jobs import Done, Setting, naming_memory, run_batch
from engine.demo.models import LoadedPcsr, load_demo_original, load_demo_pcsr
from engine.demo.report import comparison_table
from engine.demo.upscale_job import UpscaleJob
from engine.demo.words import DEFAULT_OPACITY, check_words
from engine.evaluation import Figures, Restore, mean_of, warm_up
from engine.inference_words import routing_from, warn_of_idle_original
from engine.picture_files import check_folder, find_inputs, result_stems
from engine.report import write_json
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.self_ensemble import TURNS, SelfEnsemble
from engine.sharing import PATIENCE, shared_out
from utils.allocator import keep_freed_blocks
from utils.cli import EXIT_USER_ERROR, Parser
from utils.config import load_config
from utils.distributed import World, together, world
from utils.errors import UserError
from utils.images import is_one_of
from utils.log import set_up
from utils.machine import describe, device_name

_WARM_UP_PX = 16


@dataclass(frozen=True)
class Subject:
    """What is run.

    Attributes:
        enlarger: PCSR with its routing.
        original: the network to compare with, or None.
        conventions: of the comparison's figures; None where nothing is compared.
        heading: all of it in words.
        facts: the same in plain JSON values.
    """

    enlarger: Enlarger
    original: Restore | None
    conventions: Conventions | None
    heading: str
    facts: dict[str, Any]


def main(parser: Parser) -> int:
    """Parse the command line, do the work, and say where the results are.

    Under torchrun the pictures of a folder are shared out over the ranks; rank 0 speaks.

    Returns:
        the exit code: 2 where a file of a folder failed (on rank 0: the others are content, as a
        rank that fails would end it before it has said why).
    """
    args = parser.parse_args()
    check_words(parser, args)
    with world(args.device, args.gpu, patience=PATIENCE) as current:
        set_up(main=current.is_main)
        keep_freed_blocks()
        inputs, subject = together(lambda: _prepare(args, current.device))
        if current.is_main:
            print(subject.heading, flush=True)
        setting = Setting(
            result_stems(inputs),
            args.out_dir,
            subject.enlarger,
            current.device,
            DEFAULT_OPACITY if args.opacity is None else args.opacity,
        )
        results, failures = _work(
            args, inputs, naming_memory(_job(args, setting, subject)), current
        )
        if not current.is_main:
            return 0
        means = _means(results)
        if means is not None and len(results) > 1:
            print(f"mean of {len(results)} pictures\n{comparison_table(*means)}")
        if args.json is not None:
            write_json(args.json, _to_json(results, means, failures, subject, current))
        _closing(args.out_dir, results, failures)
    return EXIT_USER_ERROR if failures else 0


def _prepare(args: argparse.Namespace, device: torch.device) -> tuple[list[Path], Subject]:
    """Find the pictures, load the models and try them, before any file is touched."""
    inputs = find_inputs(args.img_path)
    if args.json is not None and is_one_of(args.json, inputs):
        raise UserError(f"--json {args.json} is an input and would be lost")
    subject = _load(args, device)
    _warm_up(subject, device)
    check_folder(args.out_dir)
    return inputs, subject


def _work(
    args: argparse.Namespace,
    inputs: Sequence[Path],
    job: Callable[[Path], Done],
    current: World,
) -> tuple[list[Done], dict[Path, str]]:
    """A folder goes on after a file that fails; for a single picture that is the end."""
    if args.img_path.is_dir():
        return run_batch(inputs, job, current)
    (done,) = shared_out(lambda _: job(inputs[0]), [1], current)
    if current.is_main:
        print(done.text)
    return [done], {}


def _load(args: argparse.Namespace, device: torch.device) -> Subject:
    config = None if args.config is None else Path(args.config)
    pcsr = load_demo_pcsr(args.weights, config, args.overrides, device)
    original, about = None, ""
    if args.upscale:
        warn_of_idle_original(args)
    else:
        original, about = _load_original(args, pcsr.backbone, device)
    original_cost = OriginalCost(pcsr.backbone, original.model if original else None)
    if original is None and args.original_config is not None:
        original_cost = OriginalCost.of_config(pcsr.backbone, load_config(args.original_config))
    routing = routing_from(args, len(pcsr.model.upsamplers), original_cost)
    restorer = PcsrRestorer(
        pcsr.model,
        routing,
        refinement=not args.no_refinement,
        pixel_batch_size=args.pixel_batch_size,
        engine=args.engine,
        precision=args.precision,
        compiled=args.compile,
    )
    restore: Restore = restorer
    compared: Restore | None = original
    if args.self_ensemble:
        restore = SelfEnsemble(restorer)
        compared = None if original is None else SelfEnsemble(original)
    conventions = None if args.upscale else _conventions(args, routing.describe())
    lines = _heading(args, pcsr, routing.describe())
    facts = _facts(args, pcsr, routing.describe())
    if conventions is not None:
        lines.append(f"original: {about}" if original else f"PCSR runs alone: {about}")
        lines.append(f"conventions: {conventions.describe()}; HR is the photograph's centre")
        facts["original"] = about if original else None
    lines.append(f"device: {device} ({device_name(device)})")
    enlarger = Enlarger(restore, args.model_scale)
    return Subject(enlarger, compared, conventions, "\n".join(lines), facts)


def _conventions(args: argparse.Namespace, routing: str) -> Conventions:
    return Conventions(
        scale=args.scale,
        psnr_type="rgb",
        lr="bicubic float",
        crop=False,
        per_image=True,
        routing=routing,
        refinement=not args.no_refinement,
        self_ensemble=args.self_ensemble,
    )


def _heading(args: argparse.Namespace, pcsr: LoadedPcsr, routing: str) -> list[str]:
    """Lines on what runs and how."""
    refinement = "off" if args.no_refinement else "on"
    lines = [f"PCSR on {pcsr.backbone}: {pcsr.path}; {routing}, refinement {refinement}"]
    if args.model_scale is not None and (args.size or args.scale != args.model_scale):
        lines.append(f"computed at x{args.model_scale:g}, then resized by bicubic")
    if args.self_ensemble and args.upscale:
        lines.append(f"self-ensemble of {max(TURNS)}: the mean over flipped and turned copies")
    return lines


def _facts(args: argparse.Namespace, pcsr: LoadedPcsr, routing: str) -> dict[str, Any]:
    """The same in plain JSON values."""
    return {
        "pcsr": str(pcsr.path),
        "backbone": pcsr.backbone,
        "routing": routing,
        "refinement": not args.no_refinement,
        "self_ensemble": args.self_ensemble,
        "model_scale": args.model_scale,
        "engine": args.engine,
        "precision": args.precision,
    }


def _load_original(
    args: argparse.Namespace, backbone: str, device: torch.device
) -> tuple[OriginalRestorer | None, str]:
    return load_demo_original(
        args.original_weights,
        args.original_config,
        backbone=backbone,
        scale=args.scale,
        device=device,
    )


def _warm_up(subject: Subject, device: torch.device) -> None:
    """Run a few pixels, so that the first picture's time does not hold what is done only once.

    It also shows, before any file is touched, a routing that the model cannot do.
    """
    lr = torch.zeros(3, _WARM_UP_PX, _WARM_UP_PX, device=device)
    warm_up(subject.enlarger.restore, lr, (4 * _WARM_UP_PX, 4 * _WARM_UP_PX))
    if subject.original is not None and subject.conventions is not None:
        length = round(subject.conventions.scale * _WARM_UP_PX)
        warm_up(subject.original, lr, (length, length))


def _job(args: argparse.Namespace, setting: Setting, subject: Subject) -> UpscaleJob | CompareJob:
    if subject.conventions is None:
        suffix = None if args.format is None else f".{args.format}"
        return UpscaleJob(
            setting,
            scale=args.scale,
            size=args.size,
            suffix=suffix,
            class_map=args.class_map,
        )
    return CompareJob(
        setting,
        original=subject.original,
        conventions=subject.conventions,
        heading=subject.heading,
        subfolders=args.img_path.is_dir(),
    )


def _means(results: Sequence[Done]) -> tuple[Figures | None, Figures] | None:
    """The original's and PCSR's means over the photographs; None where nothing was compared."""
    compared = [done.compared for done in results if done.compared is not None]
    if not compared:
        return None
    originals = [original for original, _ in compared if original is not None]
    return mean_of(originals) if originals else None, mean_of([pcsr for _, pcsr in compared])


def _to_json(
    results: Sequence[Done],
    means: tuple[Figures | None, Figures] | None,
    failures: Mapping[Path, str],
    subject: Subject,
    current: World,
) -> dict[str, Any]:
    content: dict[str, Any] = {"images": [done.record for done in results]}
    if means is not None:
        content["mean"] = {
            model: figures and {k: v for k, v in figures.to_json().items() if k != "name"}
            for model, figures in zip(("original", "pcsr"), means, strict=True)
        }
    content["failures"] = [
        {"name": path.name, "reason": reason} for path, reason in failures.items()
    ]
    if subject.conventions is not None:
        content["conventions"] = {**subject.conventions.to_json(), "hr_crop": "centre"}
    machine = describe(current.device)
    return {**content, "model": subject.facts, "machine": machine, "processes": current.size}


def _closing(out_dir: Path, results: Sequence[Done], failures: Mapping[Path, str]) -> None:
    """Where the results are, and what failed, last."""
    if len(results) == 1 and not failures:
        print(f"The results are in {out_dir}: {', '.join(f.name for f in results[0].files)}")
    elif results:
        print(f"The results of {len(results)} pictures are in {out_dir}")
    if failures:
        sys.stdout.flush()
        total = len(results) + len(failures)
        print(f"{len(failures)} of {total} pictures failed:", file=sys.stderr)
        for reason in failures.values():
            print(f"error: {reason}", file=sys.stderr)
