"""The checkpoints in a run's folder: which are kept, which is the best, and what a crash leaves."""

import errno
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoints import Checkpoints, all_paths, load_newest, older_path
from utils.checkpoint import BEST_NAME, LAST_NAME, load_checkpoint
from utils.errors import UserError


def content(iteration: int, values: int = 10) -> dict[str, Any]:
    model = {"name": "fsrcnn", "args": {}, "sd": {"w": torch.full((values,), float(iteration))}}
    return {"model": model, "iter": iteration}


def iterations(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["iter"] for path in sorted(folder.glob("*.pth"))}


def make(
    folder: Path, keep_last: int = 2, resumed_at: int | None = None, validated_on: str = "here"
) -> Checkpoints:
    return Checkpoints(
        folder, keep_last=keep_last, resumed_at=resumed_at, validated_on=validated_on
    )


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_last_ones_are_kept_and_nothing_else_is_touched(keep_last: int, tmp_path: Path) -> None:
    (tmp_path / "iter_last.copy.pth").write_bytes(b"mine")
    (tmp_path / "iter_last.7.pth").write_bytes(b"of a run that kept more")
    for iteration in range(1, 6):
        make(tmp_path, keep_last).save(content(iteration))
    assert (tmp_path / "iter_last.copy.pth").read_bytes() == b"mine"
    (tmp_path / "iter_last.copy.pth").unlink()
    assert (tmp_path / "iter_last.7.pth").read_bytes() == b"of a run that kept more"
    (tmp_path / "iter_last.7.pth").unlink()
    names = [LAST_NAME, "iter_last.1.pth", "iter_last.2.pth"][:keep_last]
    assert iterations(tmp_path) == {name: 5 - age for age, name in enumerate(names)}


def test_without_links_copies_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    for iteration in (1, 2, 3):
        make(tmp_path, 3).save(content(iteration))
    assert iterations(tmp_path) == {LAST_NAME: 3, "iter_last.1.pth": 2, "iter_last.2.pth": 1}


def test_killed_between_the_names_and_the_new_file_nothing_is_kept_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (1, 2):
        make(tmp_path, 3).save(content(iteration))

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(Killed):
            make(tmp_path, 2).save(content(3))
    assert iterations(tmp_path) == {LAST_NAME: 2, "iter_last.1.pth": 1}
    make(tmp_path, 3)._make_room()  # all but the last step
    assert iterations(tmp_path) == {LAST_NAME: 2, "iter_last.1.pth": 2, "iter_last.2.pth": 1}
    make(tmp_path, 3).save(content(3))
    assert iterations(tmp_path) == {LAST_NAME: 3, "iter_last.1.pth": 2, "iter_last.2.pth": 1}


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 16 KB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_save_that_fails_leaves_all_as_they_were(tmp_path: Path, small_files: None) -> None:
    checkpoints = make(tmp_path, 3)
    for iteration in (1, 2):
        checkpoints.save(content(iteration))
    checkpoints.save_if_best(content(2), 30.0)
    before = iterations(tmp_path)
    for save in (checkpoints.save, lambda c: checkpoints.save_if_best(c, 31.0)):
        with pytest.raises(UserError, match=r"cannot save .*File too large; the one before is kep"):
            save(content(3, values=10_000))
    assert iterations(tmp_path) == before == {**before, LAST_NAME: 2, BEST_NAME: 2}
    assert not list(tmp_path.glob(".*"))
    assert checkpoints.best is not None and checkpoints.best.psnr == 30.0


def test_the_best_is_never_replaced_by_worse(tmp_path: Path) -> None:
    checkpoints = make(tmp_path)
    for iteration, psnr in enumerate([float("nan"), 20.0, 30.0, float("nan"), 25.0, 30.0]):
        checkpoints.save_if_best(content(iteration), psnr)
        if iteration == 3:
            checkpoints = make(tmp_path, resumed_at=3)
    best = load_checkpoint(tmp_path / BEST_NAME)
    assert best["iter"] == 2
    assert best["best"] == {"psnr": 30.0, "iteration": 2, "validated_on": "here"}
    (tmp_path / BEST_NAME).write_bytes(b"damaged")
    make(tmp_path, resumed_at=8).save_if_best(content(9), 10.0)
    assert iterations(tmp_path)[BEST_NAME] == 9


def test_the_best_of_another_validation_counts_for_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, validated_on="luma").save_if_best(content(1), 30.0)
    checkpoints = make(tmp_path, resumed_at=1, validated_on="RGB")
    assert checkpoints.best is None
    assert "best.pth was found by another validation and counts for nothing" in caplog.text
    checkpoints.save_if_best(content(2), 20.0)
    assert iterations(tmp_path)[BEST_NAME] == 2
    (kept,) = tmp_path.glob("before-*")
    assert iterations(kept) == {BEST_NAME: 1}
    make(tmp_path, resumed_at=2, validated_on="RGB").save_if_best(content(3), 19.0)
    assert iterations(tmp_path)[BEST_NAME] == 2


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_a_checkpoint_that_the_system_does_not_give_is_not_taken_for_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in (1, 2):
        make(tmp_path).save(content(iteration))

    def load(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("torch.load", load)
        with pytest.raises(UserError, match=r"iter_last.pth.*(not enough memory|Input/output)"):
            load_newest(tmp_path / LAST_NAME)
    assert load_newest(tmp_path / LAST_NAME)[1]["iter"] == 2


def test_a_damaged_checkpoint_falls_back_to_the_newest_that_can_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / LAST_NAME
    checkpoints = make(tmp_path, 4)
    for iteration in (1, 2, 3, 4):
        checkpoints.save(content(iteration))
    checkpoints.save_if_best(content(1), 30.0)
    last.write_bytes(last.read_bytes()[:-100])
    older_path(last, 1).write_bytes(b"")
    path, checkpoint = load_newest(last)
    assert (path.name, checkpoint["iter"]) == ("iter_last.2.pth", 2)
    assert f"{last} is damaged" in caplog.text and f"going on from {path}, of it" in caplog.text
    make(tmp_path, 4).save(content(3))
    assert load_checkpoint(path)["iter"] == 2, "no damaged one in its place"
    for damaged in all_paths(tmp_path):
        damaged.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"iter_last.pth .*damaged.*; no older one can be read: st"):
        load_newest(last)
