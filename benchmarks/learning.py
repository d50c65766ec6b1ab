"""What options of training are worth: short runs from the same seed, side by side.

Phase 1: its losses, from the same phase 0 weights on the same batches, and how near the routing
that they teach comes to what any classifier could reach. Phase 0: EMA, warm-up, larger patches.
Optimisers: Adam and SOAP, for an original network and for phase 0. Pixel losses: L1, L2, PSNR, and
one after the other.
"""

import argparse
import json
import logging
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":
    # Called by its path, Python looks for modules beside this file.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.cases import REPOSITORY
from benchmarks.learning_cases import (
    Trained,
    loss_variants,
    optimizer_variants,
    phase0_variants,
    train_routing,
    train_variants,
)
from benchmarks.learning_measure import (
    CLASSIFIER,
    ORACLE,
    ORDERS,
    measure,
    measure_all_heavy,
)
from benchmarks.learning_page import key_of, page
from benchmarks.results.subjects import identity
from engine.conventions import Conventions
from engine.samples import EvaluationSet, ImagePaths
from utils.atomic import write_text
from utils.cli import Parser, add_device_words, check_device_words, positive_int, run
from utils.config import Config, load_config
from utils.device import pick_device
from utils.errors import UserError
from utils.log import set_up
from utils.machine import describe


class _ConfigOption(NamedTuple):
    """The option that names a part's config."""

    name: str
    default: str
    help: str


_CONFIG_OPTIONS = {
    "routing": _ConfigOption(
        "--config",
        "configs/cpu/carn-pcsr-phase1.yaml",
        "Of phase 1, for the routing; two upsamplers.",
    ),
    "phase0": _ConfigOption(
        "--phase0_config", "configs/cpu/fsrcnn-pcsr-phase0.yaml", "Of phase 0."
    ),
    "optimizers": _ConfigOption(
        "--optimizer_config",
        "configs/cpu/carn-x4.yaml",
        "Of an original network or of phase 0, for the optimisers.",
    ),
    "losses": _ConfigOption(
        "--loss_config",
        "configs/cpu/fsrcnn-x4.yaml",
        "Of an original network or of phase 0, for the pixel losses.",
    ),
}
PARTS = tuple(_CONFIG_OPTIONS)
# How each part that trains from scratch does so.
_VARIANTS = {
    "phase0": phase0_variants,
    "optimizers": optimizer_variants,
    "losses": loss_variants,
}
_JSON, _PAGE = "learning.json", "README.md"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description="Compare options of training on short runs with the same seed: phase 1's "
        "losses; phase 0 with EMA, warm-up and larger patches; Adam and SOAP; L1, L2, PSNR. Prints "
        "tables and writes them, with all figures, to --out.",
        example="python -m benchmarks.learning --parts routing --iterations 600 --out results/tmp",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="What to compare; what is left out stays in --out as it is.",
    )
    parser.add_argument(
        "--iterations", type=positive_int, default=600, metavar="N", help="Of each run."
    )
    for part, option in _CONFIG_OPTIONS.items():
        parser.add_argument(
            option.name,
            dest=f"{part}_config",
            default=option.default,
            metavar="YAML",
            help=option.help,
        )
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("save/carn-pcsr-phase0/release.pth"),
        metavar="PATH",
        help="Phase 0's, from which the routing is trained.",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY.PATH=VALUE",
        help="Override one key of all these configs; may be given several times.",
    )
    parser.add_argument(
        "--hr_data",
        nargs="+",
        type=Path,
        default=[Path("load/benchmark/Set14/HR"), Path("load/benchmark/Set5/HR")],
        metavar="DIR",
        help="Folders of HR images to measure on; LR is made of them.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/learning"),
        metavar="DIR",
        help="Folder for README.md and learning.json.",
    )
    add_device_words(parser)
    return parser.parse_args()


def main() -> None:
    """Train, measure, print, write."""
    args = parse_arguments()
    check_device_words(args)
    set_up()
    # What trainers and loaders say of each run is no part of the table.
    logging.getLogger("engine").setLevel(logging.WARNING)
    device = pick_device(args.device, args.gpu)
    configs = {part: load_config(getattr(args, f"{part}_config"), args.overrides) for part in PARTS}
    sets = {_set_name(path): _images(path, configs["routing"]) for path in args.hr_data}
    content = _written_before(args.out)
    # All of them first: what is wrong with a config is said before an hour of training.
    variants = {
        part: make(configs[part], args.iterations)
        for part, make in _VARIANTS.items()
        if part in args.parts
    }
    for part in args.parts:
        config = configs[part]
        about = {}
        if part == "routing":
            about["weights"] = identity(args.weights)
            rows = _routing_rows(config, args.weights, args.iterations, device, sets)
        else:
            trained = train_variants(config, variants[part], args.iterations, device)
            rows = [_row(end, sets) for end in trained]
        assert config.train_dataset is not None and config.optimizer is not None
        content[key_of(part, args.optimizers_config)] = {
            "command": shlex.join(["python", "-m", "benchmarks.learning", *sys.argv[1:]]),
            "commit": _commit(),
            "machine": describe(device),
            "config": config.name,
            "is_pcsr": config.phase is not None,
            "iterations": args.iterations,
            "batch_size": config.train_dataset.batch_size,
            "precision": config.precision,
            "optimizer": config.optimizer,
            "seed": config.seed or 0,
            **about,
            "rows": rows,
        }
        write_text(args.out / _JSON, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_text(args.out / _PAGE, page(content))
    print(page(content))


def _commit() -> str | None:
    """The code that is run, as git names it; None outside of a clone."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _set_name(path: Path) -> str:
    return path.parent.name if path.name == "HR" else path.name


def _images(path: Path, config: Config) -> EvaluationSet:
    conventions = Conventions(4, config.psnr_type, "bicubic float", crop=True, per_image=True)  # type: ignore[arg-type]
    return EvaluationSet(ImagePaths.of_folders(path), conventions)


def _written_before(out: Path) -> dict[str, Any]:
    path = out / _JSON
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: delete it, or name another folder (--out)") from error


def _routing_rows(
    config: Config,
    weights: Path,
    iterations: int,
    device: torch.device,
    sets: dict[str, EvaluationSet],
) -> list[dict[str, Any]]:
    rows = []
    for variant, model in train_routing(config, weights, iterations, device):
        # What other orders reach depends on the light upsampler: shown for the first and the best.
        names = list(ORDERS) if variant.shows_orders else [CLASSIFIER, ORACLE]
        figures = {name: measure(model, images, names) for name, images in sets.items()}
        rows.append({"variant": variant.name, **{k: f.to_json() for k, f in figures.items()}})
    return rows


def _row(end: Trained, sets: dict[str, EvaluationSet]) -> dict[str, Any]:
    psnrs = {name: round(measure_all_heavy(end.model, images), 5) for name, images in sets.items()}
    return {"variant": end.variant.name, "iterations_per_s": end.iterations_per_s, **psnrs}


if __name__ == "__main__":
    run(main)
