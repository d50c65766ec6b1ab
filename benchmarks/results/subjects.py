"""Whose figures are in results/, and where their weights and figures are.

Axes: h w LR, H W output.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.conventions import Conventions
from engine.report import write_json
from engine.rerouted import part_way
from engine.restore import PcsrRestorer
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from utils.checkpoint import RELEASE_NAME, load_checkpoint
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results"
FIGURES = RESULTS / "figures"
SCALE = 4
SETS = ("Set5", "Set14", "BSD100")
CONVENTIONS = Conventions(SCALE, "rgb", "bicubic float", crop=True, per_image=True)
PARTS_OF_WAY = (0.10, 0.25, 0.50, 0.75)

_DIGITS = 5

_FIXED: dict[str, Routing] = {
    "heavy": FixedRouting(-1),
    "k0": KRouting(0.0),
    "adm": AdaptiveRouting(),
    "light": FixedRouting(0),
}
_PARTS = {f"way{100 * share:g}": share for share in PARTS_OF_WAY}
# Keys in JSON files, in the order of tables.
ROUTINGS = ("heavy", "k0", "adm", *reversed(_PARTS), "light")
LABELS = {
    "original": "original",
    "original_optimized": "original, optimised",
    "heavy": "PCSR, all-heavy",
    "k0": "PCSR, k = 0",
    "adm": "PCSR, ADM",
    "light": "PCSR, all-light",
    **{key: f"PCSR, budget {100 * share:g} % of the way" for key, share in _PARTS.items()},
}


def routing_of(
    key: str, restorer: PcsrRestorer, lr_size: tuple[int, int], size: tuple[int, int]
) -> Routing:
    """The routing of one of ROUTINGS, for an image of (h, w) to (H, W)."""
    if key in _PARTS:
        return part_way(restorer, lr_size, size, _PARTS[key])
    return _FIXED[key]


@dataclass(frozen=True)
class Subject:
    """An original network, and the PCSR that is compared with it.

    Attributes:
        name: of its files below results/figures.
        title: in tables.
        backbone: registry name.
        original, pcsr: names of configs; the weights are in the folders of these names.
        is_official: the weights are the published ones, which are not in the repository.
    """

    name: str
    title: str
    backbone: str
    original: str
    pcsr: str
    is_official: bool = False

    def weights(self, official: Path | None) -> tuple[Path | None, Path | None]:
        """Checkpoints of original and PCSR; None where they are absent."""
        found = []
        for config in (self.original, self.pcsr):
            path = ROOT / "save" / config / RELEASE_NAME
            if self.is_official:
                path = (official or Path()) / f"{config}.pth"
            absent = (self.is_official and official is None) or not path.is_file()
            found.append(None if absent else path)
        return found[0], found[1]

    @property
    def figures_path(self) -> Path:
        """Quality and FLOPs."""
        return FIGURES / f"{self.name}.json"

    @property
    def speed_path(self) -> Path:
        """Time and memory."""
        return FIGURES / f"{self.name}-speed.json"


SUBJECTS = (
    Subject("fsrcnn", "FSRCNN", "fsrcnn", "fsrcnn-x4", "fsrcnn-pcsr-phase1"),
    Subject(
        "fsrcnn-small",
        "FSRCNN, PCSR shaped by executed FLOPs",
        "fsrcnn",
        "fsrcnn-x4",
        "fsrcnn-pcsr-small-phase1",
    ),
    Subject("carn", "CARN", "carn", "carn-x4", "carn-pcsr-phase1"),
    Subject(
        "carn-official",
        "CARN, official weights",
        "carn",
        "carn-x4",
        "carn-pcsr-phase1",
        is_official=True,
    ),
    Subject("srresnet", "SRResNet", "srresnet", "srresnet-x4", "srresnet-pcsr-phase1"),
    Subject("rcan", "RCAN", "rcan", "rcan-x4", "rcan-pcsr-phase1"),
)


def chosen(names: Sequence[str]) -> list[Subject]:
    """The subjects of these names, in their usual order; all of them for no name."""
    known = [subject.name for subject in SUBJECTS]
    for name in names:
        if name not in known:
            raise UserError(f"--models {name}: choose from {', '.join(known)}")
    return [subject for subject in SUBJECTS if not names or subject.name in names]


def identity(path: Path) -> dict[str, Any]:
    """What tells one checkpoint from another, in plain values."""
    shown = path.resolve()
    return {
        "weights": str(shown.relative_to(ROOT)) if shown.is_relative_to(ROOT) else path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "iterations": load_checkpoint(path).get("iter"),
    }


def stale_files() -> list[Path]:
    """Files of figures that were measured with other weights than those in save/."""
    stale = []
    for subject in SUBJECTS:
        released = identities(subject.weights(None))
        for path in (subject.figures_path, subject.speed_path):
            content = read_json(path)
            found = {key: content.get(key, {}).get("sha256") for key in released}
            if content and found != {key: about["sha256"] for key, about in released.items()}:
                stale.append(path)
    return stale


def identities(weights: tuple[Path | None, Path | None]) -> dict[str, dict[str, Any]]:
    """The identity of original and PCSR, of those that are given."""
    named = zip(("original", "pcsr"), weights, strict=True)
    return {key: identity(path) for key, path in named if path is not None}


def watched(steps: Sequence[int], words: str) -> Iterable[int]:
    """`steps` with a progress bar where somebody watches."""
    return tqdm(steps, desc=words, unit="image", leave=False, disable=not sys.stderr.isatty())


def read_json(path: Path) -> dict[str, Any]:
    """A file of figures; empty where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_figures(path: Path, content: dict[str, Any]) -> None:
    """Write a file of figures, floats rounded: what is beyond depends on the number of threads."""
    write_json(path, _rounded(content))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value
