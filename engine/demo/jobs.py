"""What the demo's two kinds of work on picture files share, and many files in a row."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.demo.compare import Comparison
from engine.demo.enlarge import Enlarger
from utils.cli import one_line
from utils.errors import UserError


@dataclass(frozen=True)
class Done:
    """One file's work.

    Attributes:
        text: what was made and measured, to be read.
        record: the same in plain JSON values.
        comparison: where the models were compared.
        files: what was written.
    """

    text: str
    record: dict[str, Any]
    files: list[Path]
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Setting:
    """What all files of a run have in common.

    Attributes:
        stems: the inputs, and the name of each one's results.
        out_dir: where results go; it exists.
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
    inputs: Sequence[Path], job: Callable[[Path], Done]
) -> tuple[list[Done], dict[Path, str]]:
    """Work through files; one that fails does not end the run.

    Texts go to standard output as they come, above a progress bar where a terminal shows it.

    Returns:
        what went well, and the reason for each file that did not.
    """
    results, failures = [], {}
    for path in tqdm(inputs, unit="picture", dynamic_ncols=True, leave=False, disable=None):
        try:
            done = job(path)
        except (ValueError, OSError) as error:
            failures[path] = one_line(error)
        else:
            results.append(done)
            tqdm.write(done.text)
    return results, failures


@contextlib.contextmanager
def memory_named(path: Path) -> Iterator[None]:
    """Turn a lack of memory, of whichever kind, into a UserError that names the file."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError ("can't allocate memory").
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        raise UserError(
            f"image {path}: not enough memory to enlarge it whole; cut it into parts, "
            f"or use a smaller --pixel_batch_size"
        ) from error
