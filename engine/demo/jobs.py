"""What the demo's two kinds of work on picture files share, and many files in a row."""

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.demo.enlarge import Enlarger
from engine.evaluation import Figures
from engine.memory import memory_named
from engine.sharing import shared_out
from utils.cli import one_line
from utils.distributed import World
from utils.errors import UserError
from utils.images import Picture, count_frames, read_picture, read_size

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """One file's work.

    Attributes:
        text: what was made and measured, to be read.
        record: the same in plain JSON values.
        files: what was written.
        compared: figures of the original network (None where there is none) and of PCSR; None
            where nothing was compared.
    """

    text: str
    record: dict[str, Any]
    files: list[Path]
    compared: tuple[Figures | None, Figures] | None = None


@dataclass(frozen=True)
class Setting:
    """What all files of a run have in common.

    Attributes:
        stems: the inputs, and the name of each one's results.
        out_dir: where results go; made with the first of them.
        enlarger: PCSR.
        device: where the models are.
        opacity: of pictures under the class colours.
    """

    stems: Mapping[Path, str]
    out_dir: Path
    enlarger: Enlarger
    device: torch.device
    opacity: float


def run_batch(
    inputs: Sequence[Path], job: Callable[[Path], Done], world: World
) -> tuple[list[Done], dict[Path, str]]:
    """Work through files, shared out over the ranks; one that fails does not end the run.

    Texts go to rank 0's standard output as they come, above a progress bar where a terminal shows
    it.

    Returns:
        what went well, and the reason for each file that did not, on every rank.
    """

    def attempt(index: int) -> Done | str:
        try:
            return job(inputs[index])
        except (ValueError, OSError) as error:
            return one_line(error)

    results, failures = [], {}
    outcomes = shared_out(attempt, [_pixels(path) for path in inputs], world)
    hidden = None if world.is_main else True  # None: where there is no terminal
    bar = tqdm(
        outcomes,
        total=len(inputs),
        unit="picture",
        dynamic_ncols=True,
        leave=False,
        disable=hidden,
    )
    for path, outcome in zip(inputs, bar, strict=True):
        if isinstance(outcome, str):
            failures[path] = outcome
        else:
            results.append(outcome)
            if world.is_main:
                tqdm.write(outcome.text)
    return results, failures


def _pixels(path: Path) -> int:
    """How many pixels a picture has; 0 where that cannot be read."""
    try:
        return math.prod(read_size(path))
    except (ValueError, OSError):
        return 0


def naming_memory(job: Callable[[Path], Done]) -> Callable[[Path], Done]:
    """The same job, whose lack of memory is a UserError with the file's name."""

    def run(path: Path) -> Done:
        with memory_named(f"image {path}: not enough memory; cut it into parts"):
            return job(path)

    return run


def read_input(path: Path) -> Picture:
    """Read a picture; a warning says where there is more in the file than one.

    Raises:
        UserError: as `read_picture`.
    """
    picture = read_picture(path)
    with contextlib.suppress(UserError):  # the others may be damaged
        if (frames := count_frames(path)) > 1:
            _log.warning("%s holds %d pictures: the first is taken", path, frames)
    return picture
