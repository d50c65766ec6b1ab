"""When a run in training saves: by its clock, at a signal, and when it is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.checkpoints import Checkpoints
from engine.trainer import Trainer
from tests.processes import REPOSITORY
from tests.training import (
    checkpoint_of,
    differences,
    make_config,
    raw_config,
    run,
)
from utils.checkpoint import BEST_NAME, LAST_NAME, load_checkpoint
from utils.config import check_config
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_logging")


def test_checkpoint_by_the_clock(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iterate

    def crash_at_3(self: Trainer, step: int, batch: Any) -> Any:
        if step == 3:
            raise RuntimeError("crash")
        return iterate(self, step, batch)

    monkeypatch.setattr(Trainer, "_iterate", crash_at_3)
    for limit in (0, 3600):
        config = make_config("fsrcnn", pictures, iter_save_s=limit)
        with pytest.raises(RuntimeError, match="crash"):
            run(config, tmp_path / str(limit))
    assert checkpoint_of(tmp_path / "0")["iter"] == 3
    assert not (tmp_path / "3600" / "iter_last.pth").exists()


def test_failed_start_leaves_no_untrained_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """It would stand in for released weights."""
    raw = raw_config("fsrcnn", pictures)
    raw["train_dataset"]["wrapper"]["args"]["inp_size"] = 5000
    with pytest.raises(UserError, match="too small"):
        run(check_config(raw, "run"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_signal_before_the_first_iteration_leaves_no_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_batch = Trainer._next_batch

    def signal_first(self: Trainer, number: int) -> Any:
        return next_batch(self, number or signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_next_batch", signal_first)
    assert run(make_config("fsrcnn", pictures, iter_save_s=0), tmp_path) == 143
    assert not (tmp_path / LAST_NAME).exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_is_killed_ten_times_ends_with_the_weights_of_one_left_alone(
    workers: int, tmp_path: Path
) -> None:
    """SIGKILL at any moment: in an iteration, a save or a validation."""
    words = [sys.executable, "-m", "tests.killed_runs", str(tmp_path), str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for name in (LAST_NAME, BEST_NAME):
        killed, straight = (load_checkpoint(tmp_path / n / name) for n in ("killed", "straight"))
        assert not differences(killed, straight)
    assert checkpoint_of(tmp_path / "killed")["iter"] == 60
    log = (tmp_path / "killed" / "log.txt").read_text(encoding="utf-8")
    assert log.count("resumed at iteration") >= 5


def test_the_clock_begins_anew_with_each_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, save, now, saved = Trainer._iterate, Checkpoints.save, [0.0], []

    def a_second_each(self: Trainer, step: int, batch: Any) -> Any:
        now[0] += 1
        return iterate(self, step, batch)

    def noted(self: Checkpoints, content: Any) -> None:
        saved.append(content["iter"])
        save(self, content)

    monkeypatch.setattr("engine.saver.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Trainer, "_iterate", a_second_each)
    monkeypatch.setattr(Checkpoints, "save", noted)
    run(make_config("fsrcnn", pictures, iter_max=6, iter_save_s=2), tmp_path)
    assert saved == [2, 4, 6]
