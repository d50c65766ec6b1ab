"""Compiles pixel_mlp.c for this machine's processor, once."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from utils.errors import UserError

SOURCE = Path(__file__).with_name("pixel_mlp.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-ffp-contract=fast", "-std=gnu11", "-fPIC", "-shared", "-w")
# For the processor at hand; the first that the compiler knows.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())
_TIMEOUT_S = 120


def build() -> Path:
    """The compiled library, from the cache folder where it has been compiled before.

    Raises:
        UserError: there is no compiler, it fails, or the result cannot be written anywhere.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise UserError(f"CPU kernels: no C compiler ({', '.join(_COMPILERS)}) was found")
    name = f"pixel_mlp-{_fingerprint(compiler)}.so"
    for folder in _folders():
        path = folder / name
        if path.is_file():
            return path
    source_error = ""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return _compile(compiler, folder / name)
        except OSError as error:
            source_error = f"{folder}: {error.strerror or error}"
    raise UserError(f"CPU kernels: nowhere to keep what was compiled ({source_error})")


def _folders() -> list[Path]:
    """Where compiled libraries are kept: nobody else may be able to write there."""
    home = os.environ.get("XDG_CACHE_HOME")
    cache = Path(home) if home else Path("~/.cache").expanduser()
    return [cache / "pcsr", SOURCE.parent / "__pycache__"]


def _fingerprint(compiler: str) -> str:
    """Of source, compiler and processor: a home folder may be shared by different machines."""
    facts = [SOURCE.read_text(encoding="utf-8"), repr((_FLAGS, _TARGETS)), _version(compiler)]
    facts += [platform.machine(), platform.processor(), _processor_flags()]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _version(compiler: str) -> str:
    ended = _run([compiler, "--version"])
    return ended.stdout


def _processor_flags() -> str:
    """Model and instruction sets where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, path: Path) -> Path:
    """Compile to `path`, which appears whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    written = Path(name)
    try:
        for target in _TARGETS:
            ended = _run([compiler, *_FLAGS, *target, str(SOURCE), "-o", name])
            if ended.returncode == 0:
                written.replace(path)
                return path
    finally:
        written.unlink(missing_ok=True)
    reason = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[0]
    raise UserError(f"CPU kernels: {compiler} does not compile them ({reason})")


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"CPU kernels: {words[0]} does not run ({error})") from error
