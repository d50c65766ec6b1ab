"""``python -m engine.teach``: what it makes, goes on with, and refuses."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datasets
import models
from datasets.resize import imresize_uint8
from engine import teach as command
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.self_ensemble import SelfEnsemble
from models.routing import FixedRouting
from tests.processes import REPOSITORY
from tests.training import make_pictures, raw_config
from utils.checkpoint import save_checkpoint
from utils.cli import run
from utils.config import dump_yaml
from utils.images import Picture, read_rgb, to_array, to_tensor, write_picture


class Place:
    """Photographs, one of them of an odd size, and a teacher of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.photos = make_pictures(folder / "photos", count=4)
        rgb = read_rgb(next(self.photos.iterdir()))
        write_picture(self.photos / "odd.png", Picture(np.ascontiguousarray(rgb[:31, :27])))
        self.output = folder / "taught"

    def teacher(self, kind: str, seed: int = 0) -> torch.nn.Module:
        config = raw_config(kind, self.photos)
        (self.folder / f"{kind}.yaml").write_text(dump_yaml(config), encoding="utf-8")
        torch.manual_seed(seed)
        model = models.make(config["model"]).eval()
        content = {"model": {**config["model"], "sd": model.state_dict()}, "iter": 7}
        save_checkpoint(self.folder / f"{kind}.pth", content)
        return model

    def words(self, kind: str, *more: object) -> list[str]:
        words = ["--config", self.folder / f"{kind}.yaml", "--hr_data", self.photos]
        words += ["--weights", self.folder / f"{kind}.pth", "--output", self.output, *more]
        return [*map(str, words), "--device", "cpu"]

    def everything(self) -> dict[Path, bytes]:
        """All that there is, folders included."""
        found = self.folder.rglob("*")
        return {path: path.read_bytes() if path.is_file() else b"" for path in found}

    def pairs(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        lr, sr = (self.output / name for name in ("lr", "sr"))
        assert {path.name for path in lr.iterdir()} == {path.name for path in sr.iterdir()}
        return {p.stem: (read_rgb(p), read_rgb(sr / p.name)) for p in sorted(lr.iterdir())}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> int:
    monkeypatch.setattr("sys.argv", ["teach", *words])
    with pytest.raises(SystemExit) as end:
        run(command.main)
    return int(end.value.code or 0)


@pytest.mark.parametrize(("kind", "scale"), [("fsrcnn", 4), ("fsrcnn-phase1", 3)])
def test_pairs_are_the_teachers_pictures_of_lr(
    place: Place, kind: str, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = place.teacher(kind)
    words = ["--scale", 3] if kind == "fsrcnn-phase1" else []
    assert call(monkeypatch, place.words(kind, *words)) == 0
    if kind == "fsrcnn-phase1":
        restore = SelfEnsemble(PcsrRestorer(model, FixedRouting(-1)))  # type: ignore[arg-type]
    else:
        original = OriginalRestorer(model)  # type: ignore[arg-type]
        restore = SelfEnsemble(lambda lr, size: original(lr))
    pairs = place.pairs()
    assert len(pairs) == 5 and pairs["odd"][0].shape == (31 // scale, 27 // scale, 3)
    for path in place.photos.iterdir():
        lr, sr = pairs[path.stem]
        h, w = (n // scale for n in read_rgb(path).shape[:2])
        hr = read_rgb(path)[: h * scale, : w * scale]
        assert np.array_equal(lr, imresize_uint8(hr, size=(h, w)))
        expected = restore(to_tensor(lr), (h * scale, w * scale)).sr
        assert np.array_equal(sr, to_array(expected))
    spec = {"root_path_lr": str(place.output / "lr"), "root_path_hr": str(place.output / "sr")}
    data = datasets.make({"name": "paired-image-folders", "args": spec})
    assert {data[index].scale for index in range(5)} == {scale}  # type: ignore[index]


def test_the_same_command_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    words = place.words("fsrcnn", "--window", 5, "--pictures", 4)
    assert call(monkeypatch, words) == 0
    assert f"{place.output}: 4 pairs\n" in capsys.readouterr().out
    files = {path: path.read_bytes() for path in place.output.rglob("*.png")}
    assert all(
        lr.shape == (5, 5, 3) and sr.shape == (20, 20, 3) for lr, sr in place.pairs().values()
    )
    first, second, *others = sorted(place.output.rglob("lr/*.png"))
    first.unlink()
    (place.output / "sr" / second.name).unlink()
    times = {path: path.stat().st_mtime_ns for path in others}
    assert call(monkeypatch, words) == 0
    assert "4 pairs, 2 of them from before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in place.output.rglob("*.png")} == files
    assert {path: path.stat().st_mtime_ns for path in others} == times


def test_windows_and_pictures_go_by_the_seed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.teacher("fsrcnn")
    found = []
    for seed in (1, 2, 3):
        place.output = place.folder / f"taught-{seed}"
        words = place.words("fsrcnn", "--window", 6, "--pictures", 2, "--turns", 1, "--seed", seed)
        assert call(monkeypatch, words) == 0
        found.append(place.pairs())
    assert all(len(pairs) == 2 for pairs in found)
    assert len({tuple(pairs) for pairs in found}) > 1, "other pictures"
    odd = read_rgb(place.photos / "odd.png")
    one, other = (command.window(odd, 12, seed, "odd.png") for seed in (1, 2))
    assert one.shape == (12, 12, 3) and not np.array_equal(one, other)
    assert command.window(odd, 12, 1, "\udcff.png").shape == (12, 12, 3), "no UTF-8"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--turns", "4"], "were made with other turns: name another --output"),
        (["--window", "5", "--seed", "0"], "were made with other seed, window"),
        (["--pictures", "2"], "were made with other pictures ("),
        (["--weights", "{other}"], "were made with other network"),
        (["--scale", "2"], "--scale 2: this network's scale is 4"),
        (["--hr_data", "{nothing}"], "does not exist"),
        (["--output", "{file}"], "is a file, not a folder"),
        (["--output", "{foreign}"], "holds files that are not from here"),
        (["--turns", "3"], "--turns"),
    ],
)
def test_refused(
    place: Place,
    more: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place.teacher("fsrcnn", seed=1)
    (place.folder / "fsrcnn.pth").rename(place.folder / "other.pth")
    place.teacher("fsrcnn")
    foreign = place.folder / "foreign"
    write_picture(foreign / "sr" / "a.png", Picture(np.zeros((3, 3, 3), np.uint8)))
    assert call(monkeypatch, place.words("fsrcnn")) == 0
    names = {"nothing": place.folder / "no", "file": place.folder / "fsrcnn.pth"}
    names["other"] = place.folder / "other.pth"
    before = place.everything()
    more = [word.format(**names, foreign=foreign) for word in more]
    capsys.readouterr()
    assert call(monkeypatch, place.words("fsrcnn", *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert place.everything() == before


def test_other_photographs_are_not_mixed_in(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    assert call(monkeypatch, place.words("fsrcnn")) == 0
    before = place.everything()
    (place.photos / "odd.jpg").write_bytes((place.photos / "odd.png").read_bytes())
    assert call(monkeypatch, place.words("fsrcnn")) == 2
    assert "other pictures (odd.jpg for one)" in capsys.readouterr().err
    (place.photos / "odd.jpg").unlink()
    assert place.everything() == before


def test_a_bad_photograph_does_not_keep_the_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    whole = (place.photos / "odd.png").read_bytes()
    (place.photos / "0.png").write_bytes(whole[: len(whole) // 2])
    write_picture(place.photos / "tiny.png", Picture(np.zeros((3, 9, 3), np.uint8)))
    deep = np.full((12, 8, 3), 40000, np.uint16)
    write_picture(place.photos / "deep.png", Picture(deep, deep[..., 0]))
    shutil.copy(place.photos / "odd.png", place.photos / "odd.bmp")
    (place.photos / "gone.png").symlink_to(place.photos / "nowhere.png")
    for line in ("6 pairs\n", "6 pairs, 6 of them from before\n"):
        assert call(monkeypatch, place.words("fsrcnn")) == 2
        captured = capsys.readouterr()
        assert captured.out.endswith(f"{place.output}: {line}")
        damaged, gone, tiny = captured.err.splitlines()
        assert "gone.png" in gone and "does not exist" in gone
        assert damaged.startswith("not used: image") and "0.png" in damaged
        assert "tiny.png is 9x3, too small for scale 4" in tiny
    pairs = place.pairs()
    assert set(pairs) == {"1", "2", "3", "deep", "odd_bmp", "odd_png"}
    assert (pairs["deep"][0] == 156).all()


def test_one_process_at_a_time(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    holder = "import sys; from pathlib import Path; from utils.lock import locked\n"
    holder += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", holder, str(place.output)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY}
    with subprocess.Popen(words, **pipes) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == b"held\n"
        assert call(monkeypatch, place.words("fsrcnn")) == 2
        other.stdin.close()
    assert f"{place.output} is in use by process {other.pid}" in capsys.readouterr().err
    assert call(monkeypatch, place.words("fsrcnn")) == 0


def test_a_photograph_too_large_for_memory_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    pair = command.Teacher.pair

    def of_small_ones(teacher: command.Teacher, hr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if hr.shape[0] > 30:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return pair(teacher, hr)

    monkeypatch.setattr(command.Teacher, "pair", of_small_ones)
    assert call(monkeypatch, place.words("fsrcnn")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert all(line.endswith("not enough memory; a smaller --window takes less") for line in errors)
    assert set(place.pairs()) == {"odd"}


def test_a_damaged_note_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place.teacher("fsrcnn")
    place.output.mkdir()
    for content in ("{", "[1]", '{"pictures": 3}'):
        (place.output / "taught.json").write_text(content, encoding="utf-8")
        assert call(monkeypatch, place.words("fsrcnn")) == 2
        assert "taught.json is damaged: name another --output" in capsys.readouterr().err
