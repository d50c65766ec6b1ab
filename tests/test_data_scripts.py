"""The data preparation scripts, run as a user runs them."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from datasets.resize import imresize, imresize_uint8
from utils.images import Picture, list_images, read_rgb, to_array, to_tensor, write_picture

SCRIPTS = Path(__file__).resolve().parent.parent / "datasets" / "scripts"


class Done(NamedTuple):
    """How a script ended."""

    code: int
    stdout: str
    stderr: str


Script = Callable[..., Done]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script in this process: importing torch once is enough."""

    def run(name: str, *words: object) -> Done:
        path = str(SCRIPTS / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (141, 200), "b.bmp": (128, 190)}.items():
        rgb = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_picture(folder / name, Picture(rgb))
    return folder


def states(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in list_images(folder)}


def test_sub_images_twice_with_one_bad_file_among_them(
    tmp_path: Path, photographs: Path, script: Script
) -> None:
    (photographs / "c.png").write_text("not a picture")
    words = ["--input", photographs, "--output", tmp_path / "out", "--threshold", 6]
    first = script("extract_subimages", *words, "--workers", 1)
    assert first.code == 2
    assert first.stdout.startswith("8 files written, 0 were there already\n1 images failed:")
    assert "c.png" in first.stdout
    before = states(tmp_path / "out")
    assert list(before) == [f"a_s00{n}.png" for n in range(1, 7)] + [
        f"b_s00{n}.png" for n in range(1, 3)
    ]
    a = read_rgb(photographs / "a.png")
    # Columns 0, 64 and, 8 pixels being left over, 72; rows 0 and 13.
    np.testing.assert_array_equal(read_rgb(tmp_path / "out" / "a_s006.png"), a[13:141, 72:200])

    (photographs / "c.png").unlink()
    (tmp_path / "out" / "a_s002.png").unlink()
    second = script("extract_subimages", *words, "--workers", 1)
    assert second.code == 0
    assert second.stdout == "1 files written, 7 were there already\n"
    after = states(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"a_s002.png"}

    other = script("extract_subimages", *words, "--step", 32)
    assert other.code == 2
    assert "was made with step 64, not 32" in other.stderr
    assert len(other.stderr.splitlines()) == 1


def test_settings_that_made_nothing_bind_nothing(
    tmp_path: Path, photographs: Path, script: Script
) -> None:
    words = ["--input", photographs, "--output", tmp_path / "out", "--workers", 1]
    assert script("extract_subimages", *words, "--size", 9000).code == 2
    assert not list((tmp_path / "out").glob("*.png"))
    assert script("extract_subimages", *words, "--size", 64).code == 0


def test_several_processes_from_the_folder_of_the_scripts(
    tmp_path: Path, photographs: Path
) -> None:
    command = [sys.executable, "extract_subimages.py", "--input", str(photographs)]
    command += ["--output", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "4 files written, 0 were there already\n"


def test_augmentation_and_lr_images(tmp_path: Path, photographs: Path, script: Script) -> None:
    augmented = tmp_path / "augmented"
    words = ["--input", photographs, "--output", augmented, "--scales", 1, 0.6, "--workers", 1]
    assert script("data_augmentation", *words).code == 0
    assert list(states(augmented)) == ["a_0.6.png", "a_1.png", "b_0.6.png", "b_1.png"]
    a = read_rgb(photographs / "a.png")
    np.testing.assert_array_equal(read_rgb(augmented / "a_1.png"), a)
    np.testing.assert_array_equal(read_rgb(augmented / "a_0.6.png"), imresize_uint8(a, 0.6))

    for mode, expected in [
        ("uint8", imresize_uint8(a[:140, :200], 0.25)),
        ("float", to_array(imresize(to_tensor(a[:140, :200]), 0.25))),
    ]:
        hr, lr = tmp_path / mode / "HR", tmp_path / mode / "LR"
        words = ["--input", augmented, "--output_hr", hr, "--output_lr", lr, "--lr_mode", mode]
        done = script("generate_mod_LR_bic", *words, "--workers", 1)
        assert done.stdout == "8 files written, 0 were there already\n"
        np.testing.assert_array_equal(read_rgb(hr / "a_1.png"), a[:140, :200])
        np.testing.assert_array_equal(read_rgb(lr / "a_1.png"), expected)


def test_large_test_sets(tmp_path: Path, photographs: Path, script: Script) -> None:
    words = ["--input", photographs, "--output", tmp_path / "sets", "--workers", 1]
    words += ["--sets", "Test2K", "Test8K", "--scale", 3]
    refused = script("build_large_testsets", *words)
    assert refused.code == 2
    assert "a.png is 200x141: no 8K photograph" in refused.stdout
    done = script("build_large_testsets", *words, "--min_long_side", 195)
    assert done.code == 2
    assert done.stdout.startswith("4 files written, 0 were there already\n1 images failed:")
    a = read_rgb(photographs / "a.png")
    hr = imresize_uint8(a, 1 / 4)[:36, :48]
    np.testing.assert_array_equal(read_rgb(tmp_path / "sets" / "Test2K" / "HR" / "a.png"), hr)
    lr = read_rgb(tmp_path / "sets" / "Test2K" / "LR_x3" / "a.png")
    np.testing.assert_array_equal(lr, imresize_uint8(hr, 1 / 3))
    assert read_rgb(tmp_path / "sets" / "Test8K" / "HR" / "a.png").shape == (141, 198, 3)


def test_bad_words_end_in_one_line(tmp_path: Path, photographs: Path, script: Script) -> None:
    before = states(photographs)
    write_picture(photographs / "b.png", Picture(np.zeros((9, 9, 3), np.uint8)))
    for words, message in [
        (["--input", tmp_path / "none", "--output", tmp_path / "out"], "does not exist"),
        (["--input", photographs, "--output", tmp_path / "out"], "b.bmp and b.png"),
    ]:
        refused = script("data_augmentation", *words)
        assert refused.code == 2
        assert message in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    (photographs / "b.png").unlink()
    for wrong in (["--scale", "0"], ["--workers", "0"]):
        places = ["--input", photographs, "--output_lr", tmp_path / "lr"]
        refused = script("generate_mod_LR_bic", *places, *wrong)
        assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
        assert "expected a whole number, at least 1, not `0`" in refused.stderr
        assert not (tmp_path / "lr").exists()
    write_picture(tmp_path / "noted" / "a_1.png", Picture(np.zeros((9, 9, 3), np.uint8)))
    (tmp_path / "noted" / ".prepared.json").write_text("[1]", encoding="utf-8")
    noted = ["--input", photographs, "--output", tmp_path / "noted"]
    refused = script("data_augmentation", *noted)
    assert (refused.code, len(refused.stderr.splitlines())) == (2, 1)
    assert "is damaged; delete it" in refused.stderr
    refused = script("data_augmentation", "--input", photographs, "--output", f"{photographs}/.")
    assert "is the input folder" in refused.stderr
    assert states(photographs) == before
