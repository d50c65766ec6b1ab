"""The queue of trainings: what is trained, resumed and skipped; parts that carry files."""

import hashlib
import json
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch

from engine.jobs import FAILED, Job, train_all
from engine.parts import MANIFEST_NAME, pack, unpack
from engine.stop import StopSignal
from engine.train_queue import parse_arguments
from tests.training import make_pictures, raw_config
from utils.checkpoint import LAST_NAME, RELEASE_NAME, load_checkpoint, save_checkpoint
from utils.config import dump_yaml, load_config
from utils.errors import UserError

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


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve pictures, one of them in a folder below."""
    folder = make_pictures(tmp_path / "photos", count=12)
    (folder / "more").mkdir()
    (folder / "11.png").rename(folder / "more" / "11.png")
    return folder


def test_parts_hold_what_was_packed(pictures, tmp_path) -> None:
    parts = pack([pictures], tmp_path / "parts", 0.03)
    assert len(parts) > 2
    assert all(part.bytes <= 30_000 for part in parts)
    assert unpack(tmp_path / "parts", tmp_path / "there") == (12, 0)
    for path in pictures.rglob("*.png"):
        copy = tmp_path / "there" / "photos" / path.relative_to(pictures)
        assert copy.read_bytes() == path.read_bytes()
    assert unpack(tmp_path / "parts", tmp_path / "there") == (0, 12)


def test_packing_goes_on_where_it_ended(pictures, tmp_path) -> None:
    output = tmp_path / "parts"
    whole = pack([pictures], output, 0.03)
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["parts"] = manifest["parts"][:1]
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    for part in whole[1:]:
        (output / part.name).unlink()
    with pytest.raises(UserError, match="never packed"):
        unpack(output, tmp_path / "there")
    first = (output / whole[0].name).stat().st_mtime_ns
    assert pack([pictures], output, 0.03) == whole
    assert (output / whole[0].name).stat().st_mtime_ns == first


def test_what_is_there_is_not_overwritten(pictures, tmp_path) -> None:
    pack([pictures], tmp_path / "parts", 1)
    mine = tmp_path / "there" / "photos" / "3.png"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"3\.png is there already, with other content"):
        unpack(tmp_path / "parts", tmp_path / "there")
    assert mine.read_text() == "mine"
    (pictures / "new.png").write_bytes(b"new")
    with pytest.raises(UserError, match="holds other files"):
        pack([pictures], tmp_path / "parts", 1)


def test_parts_of_an_older_state_are_not_taken_for_the_new_one(pictures, tmp_path) -> None:
    pack([pictures], tmp_path / "parts", 1)
    content = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(content[::-1])
    with pytest.raises(UserError, match="older state"):
        pack([pictures], tmp_path / "parts", 1)


def test_wrong_parts_are_refused(pictures, tmp_path) -> None:
    with pytest.raises(UserError, match="raise --part-mb"):
        pack([pictures], tmp_path / "parts", 0.001)
    (part,) = pack([pictures], tmp_path / "parts", 1)
    path = tmp_path / "parts" / part.name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged"):
        unpack(tmp_path / "parts", tmp_path / "there")
    path.unlink()
    with pytest.raises(UserError, match=f"missing {part.name}"):
        unpack(tmp_path / "parts", tmp_path / "there")


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "{}/out.txt", "link/out.txt"])
def test_names_that_lead_out_are_refused(name, pictures, tmp_path) -> None:
    output, there = tmp_path / "parts", tmp_path / "there"
    there.mkdir()
    (there / "link").symlink_to(tmp_path)
    (part,) = pack([pictures], output, 1)
    path = output / part.name
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo(name.format(tmp_path)))
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["parts"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"out\.txt leads out of"):
        unpack(output, there)
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize("command", ["train", "pack", "unpack"])
def test_help(command, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train_queue", command, "--help"])
    with pytest.raises(SystemExit, match="0"):
        parse_arguments()
    assert f"python -m engine.train_queue {command}" in capsys.readouterr().out
