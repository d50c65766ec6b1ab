"""Files that appear whole or not at all."""

import contextlib
import glob
import hashlib
import itertools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import UserError

# What a file's name may have, and what temporary ones add to it: dots, a process, a random number.
_NAME_BYTES = 255
_ADDED_BYTES = 32


@contextlib.contextmanager
def replace_file(
    path: str | Path, *, sync: bool = True, first: Callable[[], None] | None = None
) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it replaces `path`, on failure it goes.

    The content is flushed to the disk before the replacement (unless `sync` is false: for files
    that can be made again), so a crash or a full disk leaves the old file as it was. Missing
    parent folders are made. `first` is called once the new file is safe, before the old one goes.

    Raises:
        UserError: `path` is a device, a pipe or the like, which a file must not replace.
    """
    path = Path(path)
    if is_device(path):
        raise UserError(f"{path} is a device or a pipe: name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        if sync:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if first is not None:
            first()
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # A full disk has no name, and the temporary one says nothing to the user.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_device(path: Path) -> bool:
    """Whether it is no file that another one may replace; /dev/stdout is none, wherever it goes."""
    folder = path.parent.resolve()
    is_special = path.exists() and not path.is_file() and not path.is_dir()
    return is_special or folder == Path("/dev") or Path("/proc") in (folder, *folder.parents)


def obstacle(folder: Path) -> Path | None:
    """What keeps a folder from being made, or written to: it, or the nearest that there is."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return None if there.is_dir() and os.access(there, os.W_OK) else there


def keep_as(path: Path, name: Path) -> None:
    """Give the file at `path` the second name `name`, taking it from another file that has it.

    A link where the file system has links, so that it takes no time and no space; else a copy.
    """
    temporary = _temporary(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
        temporary.replace(name)
    finally:
        # Also where both names are of one file already: replacing it by itself does nothing.
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    # The suffix stays last: writers choose the format by it.
    unique = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{_start_of(path)}.{unique}.tmp{path.suffix}")


def _start_of(path: Path) -> str:
    """What temporary names have of a file's: its stem; of a long one, the start and a digest."""
    name = os.fsencode(path.stem)
    room = _NAME_BYTES - _ADDED_BYTES - len(os.fsencode(path.suffix))
    if len(name) <= room:
        return path.stem
    digest = hashlib.sha256(name).hexdigest()[:16]
    return name[: max(0, room - 17)].decode(errors="ignore") + f".{digest}"


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; to a device or a pipe, as such things are written to.

    What names of files hold that is no UTF-8 is escaped.
    """
    content = text.encode("utf-8", errors="backslashreplace")
    if is_device(Path(path)):
        with Path(path).open("wb") as file:
            file.write(content)
        return
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def remove_leftovers(path: str | Path) -> None:
    """Remove what a killed process left of writing `path`; no one may be writing it now."""
    path = Path(path)
    name = f".{glob.escape(_start_of(path))}.*.tmp{glob.escape(path.suffix)}"
    for temporary in path.parent.glob(name):
        temporary.unlink(missing_ok=True)


def new_aside(folder: Path) -> Path:
    """A name in `folder` for what has to make way: before-<time>, or before-<time>-2, ...

    Nothing of that name is there, and nothing is made.
    """
    first = folder / time.strftime("before-%Y%m%d-%H%M%S")
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], others) if not path.exists())
