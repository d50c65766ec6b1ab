"""The queue of trainings: what is trained, resumed and skipped."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.jobs import FAILED, Job, train_all
from engine.stop import StopSignal
from engine.train_queue import main, parse_arguments
from tests.training import make_pictures, raw_config
from utils.checkpoint import LAST_NAME, RELEASE_NAME, load_checkpoint, save_checkpoint
from utils.config import dump_yaml, load_config
from utils.run_metrics import METRICS_NAME

WORDS = ["--device", "cpu"]


def make_job(folder: Path, kind: str, pictures: Path, **changes: object) -> Job:
    """A job of a small config, which is written below `folder`."""
    path = folder / f"{kind}.yaml"
    path.write_text(dump_yaml(raw_config(kind, pictures, **changes)), encoding="utf-8")
    return Job(path, load_config(path), folder / "save" / kind)


def train(
    jobs: list[Job], *, seconds: float = 600.0, stop: StopSignal | None = None
) -> dict[str, str]:
    """States after training for a while."""
    return train_all(jobs, time.monotonic() + seconds, WORDS, 30.0, stop or StopSignal())


def stop_when(stop: StopSignal, path: Path) -> threading.Thread:
    """Ask for the end as soon as there is a first checkpoint."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        stop.number = 15

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_run_is_stopped_resumed_finished_and_released(tmp_path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    failing = make_job(tmp_path, "carn", tmp_path / "nowhere")
    endless = make_job(tmp_path, "fsrcnn", pictures, iter_max=10**6, iter_save=1)
    last = endless.folder / LAST_NAME
    stop = StopSignal()
    stop_when(stop, last)
    states = train([failing, endless], stop=stop)
    assert states == {"carn": f"{FAILED} with exit code 2", "fsrcnn": "stopped"}
    reached = endless.iteration
    assert 0 < reached < 10**6
    assert not (endless.folder / RELEASE_NAME).exists()

    job = make_job(tmp_path, "fsrcnn", pictures, iter_max=reached + 2)
    assert train([job]) == {"fsrcnn": "finished"}
    assert load_checkpoint(job.folder / RELEASE_NAME)["iter"] == reached + 2
    before = last.stat().st_mtime_ns
    assert train([job], seconds=0.0) == {"fsrcnn": "finished"}
    assert last.stat().st_mtime_ns == before


def test_what_has_to_wait_does_not_keep_the_others(tmp_path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    damaged = make_job(tmp_path, "carn", pictures)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / LAST_NAME).write_bytes(b"nothing")
    phase0 = make_job(tmp_path, "fsrcnn-phase0", pictures)
    phase1 = make_job(tmp_path, "fsrcnn-phase1", pictures)
    released = make_job(tmp_path, "fsrcnn", pictures, iter_max=6)
    content = {"model": {"name": "fsrcnn", "sd": {"w": torch.zeros(1)}}, "iter": 6}
    save_checkpoint(released.folder / RELEASE_NAME, content)
    assert train([damaged, phase0, phase1, released], seconds=0.0) == {
        "carn": "no time left",
        "fsrcnn-phase0": "no time left",
        "fsrcnn-phase1": "waits for fsrcnn-phase0",
        "fsrcnn": "finished",
    }
    assert released.describe("finished") == "fsrcnn: finished, 6 of 6 iterations"


def test_a_run_without_its_last_validation_is_not_finished(tmp_path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    data = raw_config("fsrcnn", pictures)["train_dataset"]["dataset"]
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    valid = {"dataset": data, "wrapper": wrapper}
    job = make_job(tmp_path, "fsrcnn", pictures, iter_max=4, iter_val=2, valid_dataset=valid)
    assert train([job]) == {"fsrcnn": "finished"}
    metrics = job.folder / METRICS_NAME
    whole = metrics.read_text().splitlines()
    metrics.write_text("\n".join(whole[:-1]) + "\n")  # as where it was killed in the validation
    assert not job.is_finished
    assert job.describe("stopped").endswith(" dB at iteration 2")
    assert train([job]) == {"fsrcnn": "finished"}
    assert metrics.read_text().splitlines()[-1] == whole[-1]
    assert job.describe("finished").endswith(" dB")


def test_a_finished_run_is_mended(tmp_path) -> None:
    """Evidence that was not copied; a newest checkpoint that is damaged; what is no UTF-8."""
    job = make_job(
        tmp_path, "fsrcnn", make_pictures(tmp_path / "pictures"), iter_max=4, iter_save=2
    )
    assert train([job]) == {"fsrcnn": "finished"}
    released = job.folder / RELEASE_NAME
    evidence = job.folder / "release.log.txt"
    for path in (released, evidence):
        path.unlink()
    log = job.folder / "log.txt"
    log.write_bytes(log.read_bytes() + b"caf\xc3")
    assert train([job]) == {"fsrcnn": "finished"}
    assert evidence.read_bytes() == log.read_bytes() and released.is_file()

    last = job.folder / LAST_NAME
    weights = load_checkpoint(last)["model"]["sd"]
    last.write_bytes(last.read_bytes()[:3000])
    assert job.iteration == 2 and not job.is_finished
    assert train([job]) == {"fsrcnn": "finished"}
    for path in (last, released):
        found = load_checkpoint(path)["model"]["sd"]
        assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_linked_config_belongs_to_the_phase_0_of_its_own_name(tmp_path, monkeypatch) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    (tmp_path / "cf").mkdir()
    for phase in (0, 1):
        make_job(tmp_path, f"fsrcnn-phase{phase}", pictures, iter_max=2)
        link = tmp_path / "cf" / f"b-phase{phase}.yaml"
        link.symlink_to(tmp_path / f"fsrcnn-phase{phase}.yaml")
    configs = [str(tmp_path / "cf" / f"b-phase{phase}.yaml") for phase in (0, 1)]
    words = ["--minutes", "9", "--save_dir", str(tmp_path / "s"), "--configs", *configs, *WORDS]
    monkeypatch.setattr("sys.argv", ["train_queue", "train", *words])
    assert main() == 0
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"b-phase0", "b-phase1"}


@pytest.mark.parametrize("command", ["train", "pack", "unpack"])
def test_help(command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train_queue", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        parse_arguments()
    assert f"python -m engine.train_queue {command}" in capsys.readouterr().out


def test_no_run_is_begun_within_the_margin(tmp_path) -> None:
    job = make_job(tmp_path, "fsrcnn", tmp_path / "nowhere")
    assert train([job], seconds=20.0) == {"fsrcnn": "no time left"}


def test_released_weights_that_are_older_than_the_run_are_made_anew(tmp_path) -> None:
    job = make_job(tmp_path, "fsrcnn", make_pictures(tmp_path / "pictures"), iter_max=1)
    assert train([job]) == {"fsrcnn": "finished"}
    released = job.folder / RELEASE_NAME
    released.write_bytes(b"of an earlier end")
    os.utime(released, (1, 1))
    assert train([job], seconds=0.0) == {"fsrcnn": "finished"}
    assert load_checkpoint(released)["iter"] == 1


def test_released_weights_of_an_earlier_end_are_no_iterations_done(tmp_path) -> None:
    job = make_job(tmp_path, "fsrcnn", tmp_path / "nowhere", iter_max=9)
    job.folder.mkdir(parents=True)
    content = {"model": {"name": "fsrcnn", "sd": {"w": torch.zeros(1)}}, "iter": 6}
    save_checkpoint(job.folder / RELEASE_NAME, content)
    assert job.iteration == 0 and not job.is_finished


@pytest.mark.parametrize(
    ("number", "state"), [(15, "stopped"), (9, f"{FAILED} with exit code 137")]
)
def test_a_run_that_dies_of_a_signal(number: int, state: str, tmp_path, monkeypatch) -> None:
    words = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]
    monkeypatch.setattr(Job, "command", lambda *_: words)
    assert train([make_job(tmp_path, "fsrcnn", tmp_path)]) == {"fsrcnn": state}
