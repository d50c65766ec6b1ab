"""What the data preparation scripts share: many images, several processes, safe to run again.

Nothing is ever deleted. Each output appears whole or not at all and is left alone by the next run,
so an interrupted run is continued by the same command.
"""

import argparse
import functools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from datasets.resize import imresize, imresize_uint8
from datasets.wrappers import LR_MODES
from utils.atomic import replace_file, write_text
from utils.cli import Parser, positive_int
from utils.errors import UserError
from utils.images import Picture, encode_picture, list_images, to_array, to_tensor

# Hidden, and no image: folders of images ignore it.
_RECORD = ".prepared.json"


class Outcome(NamedTuple):
    """How many output files one input image gave."""

    written: int
    skipped: int


# Makes all outputs of one input image; must be picklable.
Job = Callable[[Path], Outcome]


@dataclass
class Report:
    """What came of a folder of images."""

    written: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 2 if self.failures else 0

    def add(self, result: Outcome | str) -> None:
        """Count an outcome, or note why an image failed."""
        if isinstance(result, str):
            self.failures.append(result)
        else:
            self.written += result.written
            self.skipped += result.skipped

    def __str__(self) -> str:
        lines = [f"{self.written} files written, {self.skipped} were there already"]
        if self.failures:
            lines.append(f"{len(self.failures)} images failed:")
            lines += [f"  {failure}" for failure in sorted(self.failures)]
        return "\n".join(lines)


def make_parser(description: str, example: str, images: str) -> Parser:
    """A parser with ``--input``, a folder of `images`, ``--workers`` and ``--overwrite``."""
    parser = Parser(
        description=f"{description} Outputs that exist are left as they are, so an interrupted "
        "run is continued by the same command.",
        example=example,
    )
    parser.add_argument("--input", required=True, metavar="DIR", help=f"Folder of {images}.")
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=_cpu_count(),
        metavar="N",
        help="Number of processes.",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Write outputs that exist already once more, instead of leaving them as they are.",
    )
    return parser


def add_lr_words(parser: argparse.ArgumentParser) -> None:
    """``--scale`` and ``--lr_mode``."""
    parser.add_argument(
        "--scale",
        type=positive_int,
        default=4,
        metavar="S",
        help="HR size per LR size, a whole number.",
    )
    parser.add_argument(
        "--lr_mode",
        choices=LR_MODES,
        default="uint8",
        help="uint8 rounds after each of the two passes, as the LR images of the benchmarks in "
        "circulation were made; float rounds once, at the end.",
    )


def lr_image(hr: np.ndarray, size: tuple[int, int], lr_mode: str) -> np.ndarray:
    """(h, w, 3) uint8 LR image of an (H, W, 3) uint8 one; in float mode rounded at the end."""
    if lr_mode == "uint8":
        return imresize_uint8(hr, size=size)
    return to_array(imresize(to_tensor(hr), size=size))


def input_images(folder: str | Path) -> list[Path]:
    """The images of `folder`; UserError where two would get the same output name."""
    paths = list_images(folder)
    seen: dict[str, Path] = {}
    for path in paths:
        # Some file systems do not tell a.png from A.png.
        other = seen.setdefault(path.stem.casefold(), path)
        if other is not path:
            raise UserError(
                f"{other.name} and {path.name} in {folder} would be written to the same name; "
                "rename one of them"
            )
    return paths


def claim_output(output: str | Path, source: str | Path, settings: dict[str, Any]) -> Path:
    """Make the output folder and note `settings` in it.

    Raises:
        UserError: it is the input folder, or was made with other settings, so that old and new
            files would mix.
    """
    output, source = Path(output), Path(source)
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the input folder; outputs go into another one")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    record = output / _RECORD
    # Without outputs there is nothing that the settings could be of.
    is_used = record.exists() and any(path.name != _RECORD for path in output.iterdir())
    try:
        noted = json.loads(record.read_text(encoding="utf-8")) if is_used else settings
        if not isinstance(noted, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(f"{record} is damaged; delete it to go on") from error
    for key in sorted(settings.keys() | noted.keys()):
        if noted.get(key) != settings.get(key):
            raise UserError(
                f"{output} was made with {key} {noted.get(key)}, not {settings.get(key)}; "
                "choose another output folder"
            )
    write_text(record, json.dumps(settings) + "\n")
    return output


def write_outputs(outputs: Iterable[tuple[Path, np.ndarray]]) -> None:
    """Write (path, (H, W, 3) uint8) pairs, each under a temporary name first.

    Unlike `write_picture` this does not wait for the disk: that would take ten times as long as
    all the rest for a small image.
    """
    for path, rgb in outputs:
        data = encode_picture(Picture(rgb), path)
        with replace_file(path, sync=False) as temporary:
            temporary.write_bytes(data)


def missing(paths: Sequence[Path], overwrite: bool) -> list[Path]:
    """Those that are to be written: all with `overwrite`, else those that do not exist."""
    return [path for path in paths if overwrite or not path.exists()]


def process_images(paths: Sequence[Path], job: Job, workers: int, description: str) -> Report:
    """Run `job` on each image. A bad image does not stop the others.

    Raises:
        UserError: fewer than one worker, or a worker that died.
    """
    if workers < 1:
        raise UserError(f"--workers must be 1 or more, not {workers}")
    report = Report()
    results = _results(paths, job, min(workers, len(paths)))
    for result in tqdm(results, description, len(paths), unit="image", disable=None):
        report.add(result)
    return report


def _results(paths: Sequence[Path], job: Job, workers: int) -> Iterator[Outcome | str]:
    if workers == 1:
        yield from (_attempt(job, path) for path in paths)
        return
    attempt = functools.partial(_attempt, job)
    # Of many images a few at a time: little traffic, yet Ctrl-C need not wait for long.
    chunk = max(1, min(16, len(paths) // (100 * workers)))
    with ProcessPoolExecutor(workers, _clean_context(), _start_worker) as pool:
        try:
            yield from pool.map(attempt, paths, chunksize=chunk)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed (out of memory?); run the command again with fewer "
                "--workers: what is finished is kept"
            ) from error


def _attempt(job: Job, path: Path) -> Outcome | str:
    """The outcome, or why there is none: what the user can put right is not to end the run."""
    try:
        return job(path)
    except (ValueError, OSError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return reason if path.name in reason else f"{path.name}: {reason}"


def _clean_context() -> multiprocessing.context.BaseContext:
    """Start processes from a fresh one: a forked copy of a process with threads may hang."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _start_worker() -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes; the parent lets running images finish and ends the run.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
