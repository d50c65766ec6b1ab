"""One process at a time in a folder."""

import contextlib
import os
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

    The folder is made, and goes again if nothing was put into it. A process that dies lets go of
    it. Where it cannot be written, or its file system has no locks, nothing is kept out.

    Raises:
        UserError: another process has it; its number is named.
    """
    if fcntl is None:
        yield
        return
    try:
        file = _open(folder)
    except OSError:
        yield
        return
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK_NAME).unlink()
                folder.rmdir()  # fails where it holds anything


def _open(folder: Path) -> IO[str]:
    """The lock file, open and locked."""
    path = folder / LOCK_NAME
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process before may have removed it since it was opened.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
                return file
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            number = file.read().strip()
            file.close()
            who = f"process {number}" if number else "another process"
            raise UserError(
                f"{folder} is in use by {who}: wait for its end, or name another folder"
            ) from error
        except BaseException:
            file.close()
            raise
        file.close()
