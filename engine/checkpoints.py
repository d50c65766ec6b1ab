"""The checkpoints in the folder of a run: the last ones, and the best one.

``iter_last.pth`` is the newest, ``iter_last.1.pth`` the one before it, and so on; ``best.pth`` is
the one with the highest validation PSNR. Each can be resumed from and holds all that inference
needs. Nothing else in the folder is touched.

A run may be taken back to an older checkpoint. Then those of later iterations are of a course that
it no longer takes: `later_paths` finds them, for the run to move them away when it goes on.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.atomic import keep_as, new_aside, remove_leftovers
from utils.checkpoint import (
    BEST_NAME,
    LAST_NAME,
    UnreadableError,
    load_checkpoint,
    save_checkpoint,
)
from utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The highest validation PSNR of a run, in dB, and after how many iterations it was."""

    psnr: float
    iteration: int


class Checkpoints:
    """Writes the checkpoints of one run.

    Args:
        folder: of the run.
        keep_last: how many of the last ones to keep, at least 1.
        resumed_at: how many iterations the run goes on from, with the `best.pth` of these to be
            beaten; None for a new run.
        validated_on: see `engine.validation`; a `best.pth` of other figures counts for nothing,
            and is moved away before there is a new one.

    Attributes:
        last_path, best_path: where the newest and the best one are, or will be.
        best: what `best.pth` holds; None where there is none that counts.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, resumed_at: int | None, validated_on: str
    ) -> None:
        self.last_path = folder / LAST_NAME
        self.best_path = folder / BEST_NAME
        self._keep_last = keep_last
        self._saved = False
        self._validated_on = validated_on
        self._best_is_other = False
        self.best = None if resumed_at is None else self._read_best(resumed_at)

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written."""
        for path in (self.last_path, self.best_path):
            remove_leftovers(path)

    def save(self, content: Mapping[str, Any]) -> None:
        """Write the newest; the one before it is kept as the config says.

        Raises:
            UserError: it cannot be written; then all are as they were.
        """
        save_checkpoint(self.last_path, content, first=self._make_room)
        self._saved = True

    def save_if_best(self, content: Mapping[str, Any], psnr: float) -> None:
        """Write the best one, if `psnr` is a number and above that of the best one so far.

        Raises:
            UserError: as :meth:`save`.
        """
        if math.isnan(psnr) or (self.best is not None and psnr <= self.best.psnr):
            return
        if self._best_is_other:
            kept = new_aside(self.best_path.parent)
            kept.mkdir()
            self.best_path.rename(kept / BEST_NAME)
            self._best_is_other = False
            logger.info("the best by another validation is kept in %s", kept)
        best = Best(psnr, content["iter"])
        about = {**dataclasses.asdict(best), "validated_on": self._validated_on}
        save_checkpoint(self.best_path, {**content, "best": about})
        self.best = best

    def _read_best(self, resumed_at: int) -> Best | None:
        if not self.best_path.exists():
            return None
        try:
            found: Any = load_checkpoint(self.best_path).get("best")
            best = Best(float(found["psnr"]), int(found["iteration"]))
            # Earlier forms do not say it.
            validated_on = found.get("validated_on", self._validated_on)
        except (UserError, TypeError, KeyError, ValueError):
            logger.warning("%s cannot be read: the next validation replaces it", self.best_path)
            return None
        if validated_on != self._validated_on:
            self._best_is_other = True
            logger.warning(
                "%s was found by another validation and counts for nothing", self.best_path
            )
            return None
        return best if best.iteration <= resumed_at else None

    def _make_room(self) -> None:
        """Shift the last ones by one name; at each moment all but the oldest are there."""
        first = older_path(self.last_path, 1)
        # The same file: the run was killed between this and the replacement of the newest.
        if not self.last_path.exists() or (first.exists() and first.samefile(self.last_path)):
            return
        # A damaged one, which this run did not start from, is not worth the place of a whole one.
        if not self._saved and _readable(self.last_path) is None:
            return
        for age in range(self._keep_last - 1, 1, -1):
            before = older_path(self.last_path, age - 1)
            if before.exists():
                before.replace(older_path(self.last_path, age))
        if self._keep_last > 1:
            keep_as(self.last_path, first)


def older_path(last: Path, age: int) -> Path:
    """Where the checkpoint is that was written `age` times before `last`."""
    return last.with_name(f"{last.stem}.{age}{last.suffix}")


def all_paths(folder: Path) -> list[Path]:
    """All checkpoints that a run wrote to its folder and that are there."""
    last = folder / LAST_NAME
    older = [p for p in folder.glob(f"{last.stem}.*{last.suffix}") if p.suffixes[-2][1:].isdigit()]
    return [p for p in (last, *sorted(older), folder / BEST_NAME) if p.exists()]


def later_paths(folder: Path, iteration: int) -> list[Path]:
    """The checkpoints in a run's folder that hold more than `iteration` iterations."""
    return [
        path
        for path in all_paths(folder)
        if (found := _readable(path)) is not None and found[1]["iter"] > iteration
    ]


def load_newest(last: Path) -> tuple[Path, dict[str, Any]]:
    """Read `last`; where it is damaged, the newest of the run's others, with a warning.

    Raises:
        UserError: none can be read; or the system does not give `last`, which may be whole.
    """
    try:
        return last, load_checkpoint(last)
    except UnreadableError:
        raise
    except UserError as error:
        problem = str(error)
    others = [path for path in all_paths(last.parent) if path != last]
    readable = [found for path in others if (found := _readable(path)) is not None]
    if not readable:
        older = "no older one can be read" if others else "there is no older one"
        raise UserError(f"{problem}; {older}: start anew with --resume never")
    path, checkpoint = max(readable, key=lambda found: found[1]["iter"])
    logger.warning(
        "%s; going on from %s, of iteration %d, instead", problem, path, checkpoint["iter"]
    )
    return path, checkpoint


def newest_iteration(last: Path) -> int:
    """The iteration that a run goes on from, as :func:`load_newest` finds it; 0 where it cannot."""
    for paths in ([last], all_paths(last.parent)):
        iterations = [found[1]["iter"] for path in paths if (found := _readable(path)) is not None]
        if iterations:
            return max(iterations)
    return 0


def _readable(path: Path) -> tuple[Path, dict[str, Any]] | None:
    try:
        checkpoint = load_checkpoint(path)
    except UserError:
        return None
    return (path, checkpoint) if isinstance(checkpoint.get("iter"), int) else None
