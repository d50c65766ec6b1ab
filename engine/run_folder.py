"""The folder of a run: an earlier run's files, the log, the resolved config."""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoints import all_paths, later_paths
from engine.recorder import METRICS_NAME
from engine.start import Start
from engine.state import scheduler_spec_of
from utils.atomic import new_aside, obstacle, write_text
from utils.config import Config, check_config, dump_yaml, load_raw
from utils.errors import UserError
from utils.log import add_file

LOG_NAME = "log.txt"
CONFIG_NAME = "config.yaml"
_NO_SPEC = {"name": None, "args": None}

logger = logging.getLogger(__name__)


def check_place(save_dir: Path) -> None:
    """Refuse a folder that cannot be one, before any work is done. Nothing is made.

    Raises:
        UserError: it is a file, or it or the folder to make it in cannot be written.
    """
    if (there := obstacle(save_dir)) is not None:
        raise UserError(f"--save_dir {save_dir}: {there} is not a writable folder")


def open_folder(save_dir: Path, config: Config, start: Start) -> None:
    """Make the folder ready for a run: from here on it is logged there.

    Raises:
        OSError: the folder cannot be written.
    """
    if start.is_of(save_dir):
        what = f"gone back to iteration {start.iteration}: checkpoints of later ones are"
        kept = set_aside_later(save_dir, start.iteration)
    else:
        what = "a new run: the one that was there is"
        kept = set_aside(save_dir)
    add_file(save_dir / LOG_NAME)
    earlier = _config_of(save_dir, config.name) if start.is_of(save_dir) else None
    write_text(save_dir / CONFIG_NAME, dump_yaml({**config.raw, "seed": start.seed}))
    if kept is not None:
        logger.info("%s kept in %s", what, kept)
    if start.resumes:
        logger.info("resumed at iteration %d from %s", start.iteration, start.path)
        for key, old, new in _changes(config, start, earlier):
            logger.info("`%s` was %s and is now %s, as the config says", key, old, new)
    elif start.path is not None:
        what = "weights" if config.phase is None else "backbone and heavy upsampler"
        logger.info("%s from %s", what, start.path)


def set_aside(save_dir: Path) -> Path | None:
    """Move an earlier run's files, which a new one would overwrite or mix with its own.

    Released weights stay. Returns the folder that they are in now; None where there were none.
    """
    names = (METRICS_NAME, LOG_NAME, CONFIG_NAME)
    found = [path for name in names if (path := save_dir / name).exists()]
    found += [*all_paths(save_dir), *save_dir.glob("events.out.*")]
    if not found:
        return None
    return _move(found, save_dir)


def set_aside_later(save_dir: Path, iteration: int) -> Path | None:
    """Move the checkpoints of later iterations than the one that a run goes back to.

    They would be taken for its own, where its newest is damaged or a validation is to be beaten.
    Its metrics, whose later rows are dropped, are copied to them. Returns the folder that they are
    in now; None where there were none, as when a run just goes on.
    """
    found = later_paths(save_dir, iteration)
    if not found:
        return None
    kept = _move(found, save_dir)
    if (save_dir / METRICS_NAME).exists():
        shutil.copy2(save_dir / METRICS_NAME, kept)
    return kept


def _move(paths: Sequence[Path], save_dir: Path) -> Path:
    """Move files to a new folder in the run's, and return that."""
    kept = new_aside(save_dir)
    kept.mkdir()
    for path in paths:
        path.rename(kept / path.name)
    return kept


def _config_of(save_dir: Path, name: str) -> Config | None:
    """The config that the folder's run had up to now; None where it cannot be read."""
    try:
        return check_config(load_raw(save_dir / CONFIG_NAME), name)
    except UserError:
        return None


def warn_of_changes(save_dir: Path, config: Config, start: Start) -> None:
    """Say where the config of a finished run is no longer what it was trained with."""
    told = "`%s` was %s and is now %s, which the finished run knows nothing of"
    for change in _changes(config, start, _config_of(save_dir, config.name)):
        logger.warning(told, *change)


def _changes(config: Config, start: Start, earlier: Config | None) -> list[tuple[str, Any, Any]]:
    """Where the config has changed since the checkpoint: keys, and their values before and now.

    Args:
        earlier: what the folder's run had, for what checkpoints do not hold.
    """
    saved = start.checkpoint or {}
    now = {"optimizer": config.optimizer or {}, "lr_scheduler": scheduler_spec_of(config)}
    changes: list[tuple[str, Any, Any]] = []
    for key, spec in now.items():
        before = {part: saved[key].get(part) for part in ("name", "args")}
        changes += _differences(before, {**_NO_SPEC, **spec}, f"{key}.")
    if saved.get("seed") is not None:
        changes += _differences({"seed": saved["seed"]}, {"seed": start.seed})
    if earlier is not None:
        # `init` is for new runs.
        known = {*now, "seed", "raw", "init"}
        values = [dataclasses.asdict(each) for each in (earlier, config)]
        before, after = ({k: v for k, v in each.items() if k not in known} for each in values)
        changes += _differences(before, after)
    return changes


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Keys, as paths with dots, whose values differ in two mappings; a missing value is None."""
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{path}{key}.")
        elif _plain(before) != _plain(after):
            yield f"{path}{key}", before, after


def _plain(value: Any) -> Any:
    """As YAML and checkpoints hold it, which have lists only."""
    return list(value) if isinstance(value, tuple) else value
