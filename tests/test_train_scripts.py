"""train.py and train_pcsr.py as a user runs them."""

import os
import pty
import runpy
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.stop import StopSignal
from tests.processes import REPOSITORY, handling
from tests.training import checkpoint_of, differences, make_pictures, metrics_of, raw_config
from utils.checkpoint import LAST_NAME
from utils.machine import device_name


@pytest.fixture
def write_config(tmp_path: Path) -> Any:
    """Writes a config file of one of `tests.training.KINDS`; returns its path."""
    pictures = make_pictures(tmp_path / "pictures")

    def write(kind: str, **changes: Any) -> Path:
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(raw_config(kind, pictures, **changes)), encoding="utf-8")
        return path

    return write


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a script in this process; returns its exit code and its standard error."""
    threads = torch.get_num_threads()

    def run(name: str, *words: object) -> tuple[int, str]:
        monkeypatch.chdir(REPOSITORY)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(name, run_name="__main__")
        assert torch.get_num_threads() == threads
        return int(end.value.code or 0), capfd.readouterr().err

    return run


def test_a_run_tells_what_it_does(script: Any, write_config: Any, tmp_path: Path) -> None:
    config = write_config("fsrcnn")
    code, shown = script("train.py", "--config", config, "--save_dir", tmp_path / "run")
    assert code == 0
    lines = [line for line in shown.splitlines() if "decoded" not in line]
    assert "fsrcnn on cpu x 1, fp32, seed 0, " in lines[0]
    assert f"{device_name(torch.device('cpu'))} (" in lines[0]
    assert "): 24.52K parameters" in lines[0]
    assert [line for line in lines if "ETA" in line and "images/s" in line] == lines[1:4]
    assert "%|" not in shown, "no progress bar where there is no terminal"
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert all(line in log for line in lines)
    code, shown = script("train.py", "--config", config, "--save_dir", tmp_path / "run")
    assert code == 0
    assert shown.startswith("nothing to do: finished at iteration 6; ")
    assert shown.count("\n") == 1


def test_shipped_tiny_configs_train_one_after_the_other(script: Any, tmp_path: Path) -> None:
    for name in ("tiny-x4", "tiny-pcsr-phase0", "tiny-pcsr-phase1"):
        words = ["--config", f"configs/{name}.yaml", "--save_dir", tmp_path / name]
        few = ["--set", "iter_max=2", "--set", "train_dataset.wrapper.args.inp_size=16"]
        code, shown = script("train.py" if name == "tiny-x4" else "train_pcsr.py", *words, *few)
        assert code == 0, shown
        assert metrics_of(tmp_path / name)[-1]["kind"] == "valid"


@pytest.mark.parametrize(
    ("name", "kind", "words", "message"),
    [
        ("train.py", "fsrcnn-phase0", [], "is a PCSR config: use train_pcsr.py"),
        ("train_pcsr.py", "fsrcnn", [], "is not a PCSR config: use train.py"),
        ("train_pcsr.py", "fsrcnn-phase0", ["--set", "phase="], "key `phase` is missing"),
        ("train.py", "fsrcnn", ["--set", "iter_mx=3"], "`iter_mx` (did you mean `iter_max`?)"),
        ("train.py", "fsrcnn", ["--resume", "no.pth"], "no.pth does not exist"),
        ("train.py", "fsrcnn", ["--device", "gpu"], "device `gpu`: choose auto, cpu, cuda"),
        ("train.py", "fsrcnn", ["--iterations", "3"], "unrecognized arguments: --iterations"),
        ("train_pcsr.py", "fsrcnn-phase1", ["--init", "no.pth"], "no.pth does not exist"),
    ],
)
def test_mistakes_get_one_line(
    name: str,
    kind: str,
    words: list[str],
    message: str,
    script: Any,
    write_config: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    code, shown = script(name, "--config", write_config(kind), "--save_dir", folder, *words)
    assert code == 2
    assert shown.startswith("error: ") and shown.count("\n") == 1 and message in shown
    assert not folder.exists(), "nothing is left of a run that never began"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_asked_for_and_absent(script: Any, write_config: Any, tmp_path: Path) -> None:
    words = ["--config", write_config("fsrcnn"), "--save_dir", tmp_path / "run", "--gpu", "0"]
    code, shown = script("train.py", *words)
    assert code == 2 and shown.count("\n") == 1
    assert "device `cuda:0` asked for" in shown and "--device cpu" in shown


def test_missing_config_is_named(script: Any) -> None:
    assert script("train.py", "--config", "no.yaml") == (
        2,
        "error: config: no.yaml does not exist\n",
    )


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left_bytes", [0, 8192, 65536])
def test_a_full_disk_ends_the_run_with_one_line(
    left_bytes: int, script: Any, write_config: Any, small_disk: Path
) -> None:
    words = ["--config", write_config("fsrcnn"), "--save_dir", small_disk / "run"]
    assert script("train.py", *words)[0] == 0
    before = checkpoint_of(small_disk / "run")
    with (small_disk / "filler").open("wb") as file:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        file.write(bytes(free - left_bytes))
    code, shown = script("train.py", *words, "--set", "iter_max=9")
    assert code == 2, shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error:")]
    assert "No space left on device" in line
    assert "Traceback" not in shown
    assert not differences(checkpoint_of(small_disk / "run"), before)
    assert not list((small_disk / "run").glob(".*"))
    (small_disk / "filler").unlink()
    assert script("train.py", *words, "--set", "iter_max=9")[0] == 0
    assert checkpoint_of(small_disk / "run")["iter"] == 9


# Signals


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP as in a terminal: what `nohup` runs ignores it."""
    with handling(signal.SIGHUP, signal.SIG_DFL):
        yield


@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_saves_and_the_run_resumes(
    number: int, script: Any, write_config: Any, tmp_path: Path
) -> None:
    """As Ctrl-C in a terminal and `timeout` send it: the loaders get it, too."""
    config = write_config("fsrcnn", iter_max=100_000, iter_print=1)
    words = ["--config", str(config), "--set", "train_dataset.num_workers=1", "--device", "cpu"]
    folder = tmp_path / "run"
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "train.py", *words, "--save_dir", str(folder)],
        cwd=REPOSITORY,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"},
    )
    os.close(follower)
    try:
        shown = read_until(leader, b"iteration 2/")
        os.killpg(process.pid, number)
        shown += read_until(leader, None)
        assert process.wait(timeout=60) == 128 + number
    finally:
        process.kill()
        os.close(leader)
    assert b"stopped by signal" in shown and b"Traceback" not in shown
    assert b"fsrcnn:" in shown and b"it/s" in shown, "a progress bar, as there is a terminal"
    done = checkpoint_of(folder)["iter"]
    assert done >= 2
    end = ["--set", f"iter_max={done + 1}"]
    assert script("train.py", *words, *end, "--save_dir", folder)[0] == 0
    assert script("train.py", *words, *end, "--save_dir", tmp_path / "straight")[0] == 0
    assert not differences(checkpoint_of(folder), checkpoint_of(tmp_path / "straight"))


def read_until(descriptor: int, words: bytes | None) -> bytes:
    """Read from a terminal until `words` come, or its end; at most 90 seconds."""
    found = b""
    limit = time.monotonic() + 90
    while time.monotonic() < limit and (words is None or words not in found):
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # Linux reports the end of a terminal so
            return found
        if not data:
            return found
        found += data
    return found


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: what a shell runs in the background ignores it."""
    with handling(signal.SIGINT, signal.default_int_handler):
        yield


@pytest.mark.usefixtures("interruptible")
def test_asking_twice_ends_at_once_but_an_echo_does_not() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGINT
        stop._noted_at -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("hang_up")
def test_a_hang_up_stops_a_run_unless_it_is_ignored() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.number


def test_release_is_never_touched(script: Any, write_config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "release.pth").write_bytes(b"released")
    assert script("train.py", "--config", write_config("fsrcnn"), "--save_dir", folder)[0] == 0
    assert (folder / "release.pth").read_bytes() == b"released"
    assert (folder / LAST_NAME).is_file()
