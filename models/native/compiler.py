"""Compiles the kernels in C for this machine's processor, once, and loads it."""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from models.native.bindings import Library
from utils.atomic import replace_file
from utils.cli import one_line
from utils.errors import UserError

FOLDER = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-ffp-contract=fast", "-std=gnu11", "-fPIC", "-shared", "-w")
# For the processor at hand; the first that the compiler knows.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 120


def load() -> Library:
    """The compiled library; from a cache folder where it has been compiled before.

    Raises:
        UserError: there is no compiler, it fails, or there is no folder to keep the result in.
    """
    prefix = f"kernels-{_fingerprint()}"
    folders = [folder for folder in _folders() if _is_ours(folder)]
    for folder in folders:
        for path in folder.glob(f"{prefix}-*.so"):
            if (kept := _loaded(path)) is not None:
                return kept
    reason = "no folder of this user's own to keep them in"
    for folder in folders:
        try:
            path = _compile(folder, prefix)
        except OSError as error:
            reason = one_line(error)
            continue
        if (made := _loaded(path)) is not None:
            return made
        reason = f"{path} cannot be loaded"
    raise UserError(f"CPU kernels: {reason}")


def _loaded(path: Path) -> Library | None:
    """None where a file is damaged, or its file system lets nothing be executed.

    The name holds a digest of the content: the loader would map a file that has lost its end, and
    the process die of the first read behind it.
    """
    try:
        if path.stem.rpartition("-")[2] == _digest(path):
            return Library(path)
    except (OSError, UserError):
        pass
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _folders() -> Iterator[Path]:
    """Where compiled libraries may be kept."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        cache = os.environ.get("XDG_CACHE_HOME")
        yield (Path(cache) if cache else Path.home() / ".cache") / "pcsr"
    yield FOLDER / "__pycache__"


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can put a library there. Made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError:
        return False
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _fingerprint() -> str:
    """Of source, flags and processor: a home folder may be shared by different machines."""
    facts = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[ch]"))]
    facts += [repr((_FLAGS, _TARGETS)), platform.system(), platform.machine(), _processor()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Model and instruction sets where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compilers() -> Iterator[list[str]]:
    """Commands to try: the one that CC names, then the usual ones."""
    with contextlib.suppress(ValueError):  # a quote that does not end
        if named := shlex.split(os.environ.get("CC", "")):
            yield named
    yield from ([name] for name in _COMPILERS if shutil.which(name))


def _compile(folder: Path, prefix: str) -> Path:
    """Compile into `folder`, where the library appears whole or not at all; returns its path.

    Raises:
        UserError: there is no compiler, or none compiles.
        OSError: `folder` cannot be written.
    """
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / "kernels.so"
        _compile_to(made)
        path = folder / f"{prefix}-{_digest(made)}.so"
        with replace_file(path) as temporary:
            shutil.copyfile(made, temporary)
            temporary.chmod(0o700)
    return path


def _compile_to(path: Path) -> None:
    reason = f"no C compiler ({', '.join(_COMPILERS)}) was found"
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    for compiler in _compilers():
        for target in _TARGETS:
            failure = _failure([*compiler, *_FLAGS, *target, *sources, "-o", str(path)])
            if failure is None and path.is_file():
                return
            reason = f"{compiler[0]} does not compile them ({failure or 'it writes nothing'})"
    raise UserError(f"CPU kernels: {reason}")


def _failure(words: list[str]) -> str | None:
    """Run a compiler; what went wrong, on one line."""
    try:
        ended = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    if ended.returncode == 0:
        return None
    return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[0]
