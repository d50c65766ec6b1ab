"""Which pictures go in, and under which names results come out, so that nothing is lost."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.errors import UserError
from utils.images import list_images


def find_inputs(img_path: Path) -> list[Path]:
    """The picture, or the pictures of the folder, sorted by name.

    Raises:
        UserError: nothing there, or a folder without pictures.
    """
    if img_path.is_dir():
        return list_images(img_path)
    if not img_path.exists():
        raise UserError(f"--img_path {img_path} does not exist")
    return [img_path]


def result_stems(inputs: Sequence[Path]) -> dict[Path, str]:
    """A name without suffix for each input's results, all different (whatever their case).

    The file's stem, or where several share it, the whole name: ``a_png`` and ``a_jpg``.
    """
    counts = Counter(path.stem.casefold() for path in inputs)
    taken = {stem for stem, count in counts.items() if count == 1}
    stems = {}
    for path in inputs:
        stem = path.stem
        if counts[stem.casefold()] > 1:
            whole = f"{stem}_{path.suffix[1:]}" if path.suffix else stem
            stem = first_free(whole, lambda name: name.casefold() not in taken)
            taken.add(stem.casefold())
        stems[path] = stem
    return stems


def first_free(stem: str, is_free: Callable[[str], bool]) -> str:
    """`stem`, or the first of ``stem_2``, ``stem_3``, ... that is free."""
    numbered = (f"{stem}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if is_free(name))


def check_folder(folder: Path, word: str = "--out_dir") -> None:
    """Try to write to a folder, or where it would be made, before any work is done.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{word} {folder} is a file, not a folder")
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise _not_writable(folder, word, error) from error


def prepare_folder(folder: Path, word: str = "--out_dir") -> None:
    """:func:`check_folder`, and make it where it is missing."""
    check_folder(folder, word)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, word, error) from error


def _not_writable(folder: Path, word: str, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"{word} {folder} cannot be written: {reason}")


# What a format's own size fields can hold, in pixels per side.
_LONGEST_SIDE_PX = {".webp": 16383, ".jpg": 65500, ".jpeg": 65500}


def check_fits(path: Path, size: tuple[int, int]) -> None:
    """Refuse a picture of `size` (H, W) that the format of `path` cannot hold.

    Raises:
        UserError: naming the limit.
    """
    longest = _LONGEST_SIDE_PX.get(path.suffix.lower(), max(size))
    if max(size) > longest:
        raise UserError(
            f"{path}: {path.suffix[1:]} holds at most {longest} pixels a side, not "
            f"{size[1]}x{size[0]}: use --format png"
        )
