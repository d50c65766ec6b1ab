"""One process at a time in a folder (utils.lock)."""

import fcntl
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY
from tests.training import make_config, make_pictures, run
from utils.errors import UserError
from utils.lock import LOCK_NAME, locked

pytestmark = pytest.mark.usefixtures("fresh_logging")
HOLDER = "import sys; from pathlib import Path; from utils.lock import locked\n"
HOLDER += "with locked(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that has `tmp_path`/run."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, cwd=REPOSITORY, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def test_a_folder_has_one_process_until_that_ends(holder: subprocess.Popen, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        pytest.raises(UserError, match=f"in use by process {holder.pid} on .*: wait"),
        locked(folder),
    ):
        pass
    holder.communicate("")
    assert not folder.exists()  # it held nothing else
    with locked(folder):
        assert (folder / LOCK_NAME).read_text(
            encoding="utf-8"
        ) == f"process {os.getpid()} on {platform.node()}\n"
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_killed_process_lets_go(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_NAME).exists()
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(
    holder: subprocess.Popen, tmp_path: Path
) -> None:
    config = make_config("fsrcnn", make_pictures(tmp_path / "pictures"))
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"):
        run(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_NAME]
    holder.communicate("")
    assert run(config, tmp_path / "run") == 0
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_folders_that_were_there_stay_and_those_that_were_made_go(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "run"):
        with locked(folder):
            assert (folder / LOCK_NAME).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_the_lock_of_another_process_is_not_removed(tmp_path: Path) -> None:
    """Where the folder was moved, and another run has begun in its place."""
    folder = tmp_path / "run"
    with locked(folder):
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / LOCK_NAME).touch()
    assert (folder / LOCK_NAME).exists()


def test_a_folder_that_cannot_be_made_is_left_to_others_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "run"):
        pass
    assert (tmp_path / "file").is_file()


def test_an_error_inside_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the run"), locked(tmp_path / "run"):
        raise OSError("of the run")
    assert not (tmp_path / "run").exists()


def test_a_lock_file_that_went_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before removes it between this one's opening and locking it."""
    folder, lockf = tmp_path / "run", fcntl.lockf
    calls: list[Any] = []

    def late(*words: Any) -> None:
        if not calls:
            (folder / LOCK_NAME).unlink()
        calls.append(words)
        lockf(*words)

    monkeypatch.setattr("fcntl.lockf", late)
    with locked(folder):
        assert (folder / LOCK_NAME).read_text(encoding="utf-8").startswith("process ")
    assert len(calls) == 2
