"""Several processes of one test, with torchrun's environment."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240


def free_port() -> int:
    """A port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(job: str, folder: Path, size: int = 2) -> list[tuple[int, str]]:
    """Run tests/distributed_worker.py in `size` processes; exit code and stderr of each."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    words = [sys.executable, "-m", "tests.distributed_worker", job, str(folder)]
    processes = [
        subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


@contextlib.contextmanager
def handling(number: int, action: Any) -> Iterator[None]:
    """A signal is handled so while entered, by child processes, too, where they inherit that."""
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)


def needs_name(path: Path) -> None:
    """Skip the test where the file system takes no such name (macOS: only UTF-8)."""
    try:
        path.touch()
        path.unlink()
    except OSError:
        pytest.skip(f"the file system takes no name such as {path.name!a}")


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Run ``./dist.sh`` with `words` on the CPU; what it prints and returns."""
    return subprocess.run(
        [sys.executable, "-m", "utils.launch", "--device", "cpu", *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def lines(text: str) -> list[str]:
    """The lines of `text` that report an error."""
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]
