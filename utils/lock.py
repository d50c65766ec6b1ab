"""One process at a time: in a folder, or with a file."""

import contextlib
import os
import platform
from collections.abc import Iterator
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
def one_after_the_other(path: Path) -> Iterator[bool]:
    """Wait until no other process is in here with the same `path`, a file that is made for that.

    A process that dies lets go of it. Yields False, without waiting, where there are no locks.

    Raises:
        OSError: the file cannot be made.
    """
    file: IO[str] | None = None
    while fcntl is not None:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            _remove(path, file)
            file = None
            break
        except BaseException:
            file.close()
            raise
        if _is_of(path, file):
            break
        file.close()  # the process before removed it since it was opened
    try:
        yield file is not None
    finally:
        if file is not None:
            _remove(path, file)


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
