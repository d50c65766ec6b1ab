"""Compiles the kernels in C for this machine's processor, once, and loads it."""

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
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
    name = f"kernels-{_fingerprint()}.so"
    places = [folder / name for folder in _folders() if _is_ours(folder)]
    for path in places:
        if path.exists() and (kept := _loaded(path)) is not None:
            return kept
    reason = "no folder of this user's own to keep them in"
    for path in places:
        try:
            _compile(path)
        except OSError as error:
            reason = one_line(error)
            continue
        if (made := _loaded(path)) is not None:
            return made
        reason = f"{path} cannot be loaded"
    raise UserError(f"CPU kernels: {reason}")


def _loaded(path: Path) -> Library | None:
    """None where a file is damaged, or its file system lets nothing be executed."""
    try:
        return Library(path)
    except UserError:
        return None


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
    if named := shlex.split(os.environ.get("CC", "")):
        yield named
    yield from ([name] for name in _COMPILERS if shutil.which(name))


def _compile(path: Path) -> None:
    """Compile to `path`, which appears whole or not at all.

    Raises:
        UserError: there is no compiler, or none compiles.
        OSError: `path` cannot be written.
    """
    reason = f"no C compiler ({', '.join(_COMPILERS)}) was found"
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    with replace_file(path) as temporary:
        for compiler in _compilers():
            for target in _TARGETS:
                words = [*compiler, *_FLAGS, *target, *sources, "-o", str(temporary)]
                failure = _failure(words)
                if failure is None:
                    temporary.chmod(0o700)
                    return
                reason = f"{compiler[0]} does not compile them ({failure})"
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
