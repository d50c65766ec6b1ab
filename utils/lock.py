"""One process at a time in a folder; files that go with the process that was writing them."""

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from utils.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of `folder` while entered.

    The folder is made where it is missing, and goes again if nothing was put into it. A process
    that dies lets go of it. Where it cannot be written, or its file system has no locks, nothing
    is kept out.

    Raises:
        UserError: another process has it; its machine and number are named.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    file: IO[str] | None = None
    try:
        with contextlib.suppress(OSError):
            file = _lock(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            if file is not None:
                _remove(folder / LOCK_NAME, file)
            for path in missing:
                path.rmdir()  # fails where it holds anything


@contextlib.contextmanager
def owned(path: Path) -> Iterator[None]:
    """Make the file `path`, which must not be there, and keep `remove_ownerless` off while entered.

    Raises:
        OSError: it cannot be made.
    """
    with path.open("xb") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_ownerless(paths: Iterable[Path]) -> None:
    """Remove those files that `owned` made and whose process has died in it.

    Where there are no locks, nothing is removed.
    """
    for path in paths if fcntl is not None else ():
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _lock(folder: Path) -> IO[str] | None:
    """The lock file, open and locked; None where there are no locks."""
    path = folder / LOCK_NAME
    while fcntl is not None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # the process before has just removed the folder
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{folder} is in use by {who}: wait for its end, or name another folder (if it is "
                f"gone for good, delete {path})"
            ) from error
        except BaseException:
            file.close()
            raise
        if _is_of(path, file):
            with contextlib.suppress(OSError):  # a full disk: who has it is not told
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
            return file
        file.close()  # the process before removed it since it was opened
    return None


def _remove(path: Path, file: IO[str]) -> None:
    """Remove the lock file, if it is still this one, and let go."""
    with file:
        if _is_of(path, file):
            path.unlink()


def _is_of(path: Path, file: IO[str]) -> bool:
    """Whether the open file is what is called `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
