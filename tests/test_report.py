"""Pictures of training runs: what they are drawn from, and what is said where there is nothing."""

import json
import sys
from pathlib import Path

import pytest

from tests.processes import REPOSITORY
from utils.cli import run
from utils.config import load_config
from utils.images import read_rgb
from utils.report import Run, main

PHASE_1 = REPOSITORY / "save" / "carn-pcsr-phase1"


@pytest.fixture
def report(monkeypatch, capsys):
    """Run the command line; (exit code, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


def write_metrics(folder: Path, *rows: object, broken: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, *broken]) + "\n")
    return folder


def row(iteration: int, kind: str = "train", **values: object) -> dict[str, object]:
    return {"iteration": iteration, "kind": kind, **values}


def test_one_run_and_several(report, tmp_path) -> None:
    rows = [row(n, loss=1 / n, lr=1e-3, iterations_per_s=2.0, grad_norm=0.5) for n in range(1, 300)]
    rows += [row(n, "valid", scale=4.0, name="sr", psnr=20.0 + n) for n in (100, 200)]
    # An unfinished line, one of another shape, and a value that JSON cannot hold.
    folder = write_metrics(
        tmp_path / "mine", *rows, row(300, "valid", psnr=None), broken=('{"iteration": 4', "[]")
    )
    code, output, errors = report(folder)
    assert (code, output) == (0, f"plot: {folder / 'report.png'}\n")
    assert errors == f"{folder / 'metrics.jsonl'}: 2 broken lines left out\n"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.png"]
    both = tmp_path / "new" / "both.png"
    assert report(folder, PHASE_1 / "release.metrics.jsonl", "--out", both)[0] == 0
    assert read_rgb(both).shape[1] == read_rgb(folder / "report.png").shape[1]


def test_figures_of_other_validations_are_other_lines(tmp_path) -> None:
    rows = [
        row(n, "valid", scale=4.0, name="sr", psnr=20.0 + n, validated_on=kind)
        for n, kind in ((1, "rgb1"), (2, "luma"), (3, "luma"))
    ]
    lines = list(Run.read(write_metrics(tmp_path / "run", *rows)).validation("psnr"))
    assert lines == [("x4 sr (rgb1)", [1.0], [21.0]), ("x4 sr (luma)", [2.0, 3.0], [22.0, 23.0])]


def test_lines_of_released_metrics() -> None:
    released = Run.read(PHASE_1)
    assert released.picture.name == "release.report.png"
    assert [name for name, _, _ in released.validation("psnr")] == ["x4 k0", "x4 heavy"]
    assert released.keys("loss_") == ["loss_rgb", "loss_gain"]
    (name, iterations, values), *_ = released.train("loss_rgb", "grad_norm")
    end = load_config(PHASE_1 / "release.config.yaml").iter_max
    assert (name, iterations[-1], len(iterations)) == ("loss_rgb", end, len(values))


def test_what_cannot_be_drawn_is_said_in_one_line(report, tmp_path) -> None:
    empty = write_metrics(tmp_path / "empty", broken=("nonsense",))
    (tmp_path / "bare").mkdir()
    for words, problem in (
        ([tmp_path / "none"], "no such run"),
        ([tmp_path / "bare"], "it has no metrics.jsonl"),
        ([empty], "no metrics that can be read (1 broken lines)"),
        ([PHASE_1, PHASE_1], "--out"),
        ([write_metrics(tmp_path / "other", row(1, "note"))], "nothing to draw"),
    ):
        code, _, errors = report(*words)
        assert (code, errors.count("\n")) == (2, 1)
        assert problem in errors
