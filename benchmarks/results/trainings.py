"""How the released weights were trained, from the evidence beside them in save/."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.results.subjects import ROOT, SUBJECTS
from benchmarks.results.tables import NONE, table
from engine.pixel_loss import PixelLoss
from utils.config import Config, load_config
from utils.run_metrics import METRICS_NAME, read_rows

# Device, processes and iterations, in the log line that a run starts with.
_STARTED = re.compile(
    r"^\d{4}\S* \S+ \S+ on (\S+) x (\d+), .* iterations (\d+) to (\d+)$", re.MULTILINE
)


def training_table() -> str:
    """How the released weights were trained, from what is beside them."""
    titles = ["config", "iterations", "batch", "LR patch", "optimizer", "learning rate"]
    titles += ["loss", "precision", "device", "hours", "begins with", "validation"]
    names = [
        name
        for subject in SUBJECTS
        for name in (
            subject.original,
            subject.pcsr.replace("phase1", "phase0"),
            subject.pcsr,
        )
    ]
    lines = [
        _training_line(name)
        for name in dict.fromkeys(names)
        if (ROOT / "save" / name / "release.config.yaml").is_file()
    ]
    return table(titles, lines, left=1)


def _training_line(name: str) -> list[str]:
    folder = ROOT / "save" / name
    config = load_config(folder / "release.config.yaml")
    rows, trained = _rows(folder)
    # Once: valid_x4_sr.
    valid = [row for row in rows if row["kind"].startswith("valid")]
    last = [row["psnr"] for row in valid if row["iteration"] == valid[-1]["iteration"]]
    starts = [0, *(row["iteration"] for row in trained)]
    seconds = sum(
        (last - first) / row["iterations_per_s"]
        for (first, last), row in zip(pairwise(starts), trained, strict=True)
    )
    assert config.train_dataset is not None and config.optimizer is not None
    log = (folder / "release.log.txt").read_text(encoding="utf-8")
    starts_logged = list(_STARTED.finditer(log))
    # A start at the end trains nothing: it only validates.
    places = sorted({(match[1], match[2]) for match in starts_logged if match[3] != match[4]})
    return [
        f"`{name}`",
        str(trained[-1]["iteration"] if trained else 0),
        str(config.train_dataset.batch_size),
        str(config.train_dataset.wrapper["args"].get("inp_size", NONE)),
        config.optimizer["name"],
        _rates(config),
        _loss(config),
        config.precision,
        ", ".join(f"{device} x {count}" for device, count in places) or NONE,
        f"{seconds / 3600:.2f}",
        NONE if config.init is None else f"`{config.init}`",
        f"{last[0]:.2f} dB" if last else NONE,
    ]


def _rates(config: Config) -> str:
    """The learning rate that each cosine starts from, and where."""
    assert config.optimizer is not None and config.lr_scheduler is not None
    first, args = config.optimizer["args"]["lr"], config.lr_scheduler["args"]
    restarts = zip(args.get("restarts", ()), args.get("weights", ()), strict=False)
    # A restart at the very end restarts nothing.
    later = [f"{first * w:g} from {at}" for at, w in restarts if at < config.iter_max]
    return ", ".join([f"{first:g}", *later])


def _loss(config: Config) -> str:
    """That of the pixels, and in phase 1 that of the routing with its arguments."""
    first, *later = PixelLoss(config.l2_from, config.psnr_from).stages
    pixels = ", ".join([first.name, *(f"{stage.name} from {stage.start}" for stage in later)])
    if config.phase != 1:
        return pixels
    spec = config.routing_loss or {"name": "published"}
    args = (spec.get("args") or {}).items()
    return "; ".join([pixels, ", ".join([spec["name"], *(f"{k} {v}" for k, v in args)])])


def patches_seen(name: str) -> str:
    """LR patches that a run drew, in millions; `+` where it began with others' weights."""
    folder = ROOT / "save" / name
    if not (folder / "release.config.yaml").is_file():
        return NONE
    config = load_config(folder / "release.config.yaml")
    _, trained = _rows(folder)
    assert config.train_dataset is not None
    count = trained[-1]["iteration"] * config.train_dataset.batch_size
    return f"{count / 1e6:.2f} M{'' if config.init is None else ' +'}"


def _rows(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows of a run's metrics, and those of training."""
    rows, _ = read_rows(folder / f"release.{METRICS_NAME}")
    return rows, [row for row in rows if row["kind"] == "train"]
