"""Where the pixels of an image folder come from: the files, memory, or an LMDB of the files.

A store maps the index of an image to (H, W, 3) uint8 RGB. Stores can be pickled, so they work
with forked and with spawned workers.
"""

import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.images import decode_picture, read_bytes, read_rgb, to_8_bit
from utils.lock import one_after_the_other
from utils.registry import nearest

_log = logging.getLogger(__name__)

CACHES = ("none", "in_memory", "lmdb", "device")
T = TypeVar("T")
# Told of an image that cannot be read: its index and why. To go on without it, it returns.
OnDamaged = Callable[[int, UserError], None]
_MANIFEST_KEY = b"\0manifest"
_PAGE_BYTES = 4096
_IMAGES_PER_COMMIT = 64
# Of the name of a folder in that of its LMDB.
_NAME_BYTES = 180


class ImageStore(Protocol):
    """Images by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB, not to be changed; UserError naming the file if it is damaged."""
        ...


def check_cache(cache: str) -> str:
    """`cache`, if there is such a cache.

    Raises:
        UserError: there is not; the known ones are listed.
    """
    if cache not in CACHES:
        known = ", ".join(CACHES)
        raise UserError(f"unknown cache `{cache}`{nearest(cache, CACHES)}; known: {known}")
    return cache


def open_store(
    paths: Sequence[Path], cache: str, cache_dir: str | Path | None, on_damaged: OnDamaged
) -> ImageStore:
    """Make the store that `cache` names.

    Args:
        paths: image files, in order.
        cache: ``none`` decodes a file each time; ``in_memory`` decodes all of them now and keeps
            3 bytes per pixel, which forked workers share; ``lmdb`` copies the files into one
            LMDB file, for file systems that are slow with many small files.
        cache_dir: folder of the LMDB file; default ``$XDG_CACHE_HOME/pcsr``.
        on_damaged: called for each image that cannot be read now.
    """
    if cache == "none":
        return FileStore(paths)
    if cache == "in_memory":
        return MemoryStore(paths, on_damaged)
    if cache == "lmdb":
        return LmdbStore(paths, cache_dir)
    raise ValueError(f"no store is named {cache}")


def in_threads(job: Callable[[int], T], count: int, description: str) -> Generator[T, None, None]:
    """``job(0)``, ``job(1)``, ... from a few threads, in order, with a progress bar.

    Closing the generator early cancels what has not begun.
    """
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        # disable=None: no bar where the output is no terminal.
        yield from tqdm(pool.map(job, range(count)), description, count, leave=False, disable=None)
    finally:
        pool.shutdown(cancel_futures=True)


class FileStore:
    """Decodes a file each time it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_rgb(self.paths[index])


class MemoryStore:
    """Decodes everything once, in threads, at construction."""

    def __init__(self, paths: Sequence[Path], on_damaged: OnDamaged) -> None:
        self.images: list[np.ndarray | UserError] = []
        images = in_threads(lambda index: _attempt(paths[index]), len(paths), "decoding")
        with contextlib.closing(images):
            for index, image in enumerate(images):
                if isinstance(image, UserError):
                    on_damaged(index, image)
                self.images.append(image)
        decoded = [image for image in self.images if isinstance(image, np.ndarray)]
        size_mib = sum(image.nbytes for image in decoded) / 2**20
        _log.info("%d images decoded, %.0f MiB in memory", len(decoded), size_mib)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        image = self.images[index]
        if isinstance(image, UserError):
            raise image
        return image


def _attempt(path: Path) -> np.ndarray | UserError:
    try:
        return read_rgb(path)
    except UserError as error:
        return error


class LmdbStore:
    """The bytes of the image files in one LMDB file, keyed by path; decoded when asked for.

    The LMDB is made on first use and made anew when a file's size or time differs from what was
    stored. Each process opens it for itself, when it first reads.
    """

    def __init__(self, paths: Sequence[Path], cache_dir: str | Path | None = None) -> None:
        _import_lmdb()
        # The folder resolved, and not the files in it: links to several may have one name.
        self.paths = [path.parent.resolve() / path.name for path in paths]
        self.keys = [_key(path) for path in self.paths]
        folder = Path(cache_dir).expanduser() if cache_dir else _default_cache_dir()
        images = self.paths[0].parent
        digest = hashlib.sha256(os.fsencode(images)).hexdigest()[:16]
        # LMDB takes names in UTF-8 alone.
        name = images.name.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")
        self.database = folder / f"{name}-{digest}.lmdb"
        manifest = {
            key.hex(): _state(path) for key, path in zip(self.keys, self.paths, strict=True)
        }
        if not self._holds(manifest):
            self._make(manifest)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        with _environment(self.database).begin(buffers=True) as transaction:
            data = transaction.get(self.keys[index])
            # A file that could not be read when the LMDB was made says once more why.
            content = read_bytes(self.paths[index]) if data is None else bytes(data)
            return to_8_bit(decode_picture(content, self.paths[index]).rgb)

    def _make(self, manifest: dict[str, list[int]]) -> None:
        """Build the LMDB, unless another process does: it would be built once by each."""
        self.database.parent.mkdir(parents=True, exist_ok=True)
        with one_after_the_other(self.database.with_name(f".{self.database.stem}.lock")) as alone:
            if alone:
                for left in self.database.parent.glob(_temporary(self.database, "*", glob.escape)):
                    left.unlink(missing_ok=True)  # by a process that was killed
            if not self._holds(manifest):
                _build(self.database, self.paths, self.keys, manifest)

    def _holds(self, manifest: dict[str, list[int]]) -> bool:
        if not self.database.is_file():
            return False
        lmdb = _import_lmdb()
        try:
            with _environment(self.database).begin() as transaction:
                stored = json.loads(transaction.get(_MANIFEST_KEY, b"{}"))
        except (lmdb.Error, ValueError):
            return False
        return all(stored.get(key) == state for key, state in manifest.items())


def _import_lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError(
            "cache `lmdb` needs the package lmdb: pip install lmdb, or use cache `in_memory`"
        ) from error
    return lmdb


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pcsr"


def _key(path: Path) -> bytes:
    """Name of the file; hashed where it is longer than an LMDB key (511 bytes) may be."""
    name = os.fsencode(path.name)
    return name if len(name) <= 500 else hashlib.sha256(name).digest()


def _state(path: Path) -> list[int]:
    """What tells a changed file: size and time of change; of one that is not there, zeros."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


def _temporary(database: Path, unique: str, escape: Callable[[str], str] = str) -> str:
    """The name of a file beside `database` that is to become it; with its name escaped."""
    return f".{escape(database.stem)}.{unique}.tmp"


def _build(
    database: Path, paths: Sequence[Path], keys: Sequence[bytes], manifest: dict[str, list[int]]
) -> None:
    """Write the LMDB under a temporary name and rename it, so that no process sees half of it."""
    lmdb = _import_lmdb()
    pages = sum(state[0] // _PAGE_BYTES + 3 for state in manifest.values())
    map_size = pages * _PAGE_BYTES + 16 * 2**20 + 256 * len(paths)
    temporary = database.with_name(_temporary(database, uuid.uuid4().hex))
    try:
        with lmdb.open(str(temporary), map_size=map_size, subdir=False, lock=False) as environment:
            _fill(environment, paths, keys, manifest)
        temporary.replace(database)
    except lmdb.Error as error:
        raise UserError(f"the LMDB {database} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _log.info("%d files stored in %s", len(paths), database)


def _fill(
    environment: Any, paths: Sequence[Path], keys: Sequence[bytes], manifest: dict[str, list[int]]
) -> None:
    entries = list(zip(keys, paths, strict=True))
    progress = tqdm(total=len(entries), desc="building LMDB", leave=False, disable=None)
    for first in range(0, len(entries), _IMAGES_PER_COMMIT):
        chunk = entries[first : first + _IMAGES_PER_COMMIT]
        with environment.begin(write=True) as transaction:
            for key, path in chunk:
                with contextlib.suppress(UserError):
                    transaction.put(key, read_bytes(path))
        progress.update(len(chunk))
    progress.close()
    with environment.begin(write=True) as transaction:
        transaction.put(_MANIFEST_KEY, json.dumps(manifest).encode())


def _environment(database: Path) -> Any:
    # A rebuilt file has another inode.
    return _open_environment(str(database), database.stat().st_ino)


@functools.lru_cache(maxsize=16)
def _open_environment(database: str, inode: int) -> Any:
    """The one open environment of a file in this process: LMDB forbids a second."""
    lmdb = _import_lmdb()
    _close_before_forks()
    return lmdb.open(database, subdir=False, readonly=True, lock=False, readahead=False)


@functools.cache
def _close_before_forks() -> None:
    """An environment must not cross a fork; parent and child open it again when they read."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_open_environment.cache_clear)
