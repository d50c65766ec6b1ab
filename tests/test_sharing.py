"""Evaluation and demo in two processes: what one process gives, and one clear end."""

import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from tests.processes import REPOSITORY, free_port, lines, start
from utils.checkpoint import save_checkpoint
from utils.config import load_config
from utils.images import Picture, write_picture

# By name, neither the largest nor the smallest comes first.
SIZES = {"a.png": (64, 80), "b.png": (140, 132), "c.png": (60, 60)}
# What depends on the clock, or says how many processes there were.
CIRCUMSTANCES = {
    "time_s",
    "machine",
    "processes",
    "peak_memory_bytes",
    "output",
    "class_map",
    "files",
}


def make_place(folder: Path) -> dict[str, Path]:
    """Pictures of three sizes, the same beside one that is damaged, and untrained weights."""
    generator = np.random.default_rng(0)
    for name, size in SIZES.items():
        picture = Picture(generator.integers(0, 256, (*size, 3), np.uint8))
        for parent in ("hr", "damaged"):
            write_picture(folder / parent / name, picture)
    path = folder / "damaged" / "c.png"
    path.write_bytes(path.read_bytes()[:9000])
    place = {"hr": folder / "hr", "damaged": folder / "damaged"}
    for name in ("tiny-x4", "tiny-pcsr-phase1"):
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
        torch.manual_seed(0)
        model = models.make(config.model, data_norm=config.data_norm)
        place[name] = folder / f"{name}.pth"
        save_checkpoint(place[name], {"model": {**config.model, "sd": model.state_dict()}})
    return place


def command_lines(place: dict[str, Path], out: Path) -> dict[str, list[str]]:
    """Every way of sharing pictures out; results go to `out`."""

    def evaluation(name: str, *more: str, data: str = "hr") -> list[str]:
        script = "test_pcsr.py" if "pcsr" in name else "test.py"
        config = f"--config=configs/{name}.yaml"
        return [script, config, f"--weights={place[name]}", f"--hr_data={place[data]}", *more]

    def demo(*more: str, data: str = "damaged") -> list[str]:
        weights = f"--weights={place['tiny-pcsr-phase1']}"
        return ["demo.py", f"--img_path={place[data]}", weights, *more]

    commands = {
        "original in patches": evaluation("tiny-x4", "--bicubic", "--all_psnr"),
        "adaptive in patches": evaluation("tiny-pcsr-phase1", "--adaptive"),
        "budget": evaluation("tiny-pcsr-phase1", "--budget=0.013G", "--per_image"),
        "sweep": evaluation("tiny-pcsr-phase1", "--sweep", "--per_image"),
        "damaged": evaluation("tiny-x4", data="damaged"),
        "comparison": demo(
            f"--out_dir={out / 'compared'}", f"--original_weights={place['tiny-x4']}"
        ),
        "enlargement": demo(f"--out_dir={out / 'larger'}", "--upscale", "--class_map"),
    }
    return {
        name: [*words, "--device=cpu", f"--json={out / f'{name}.json'}"]
        for name, words in commands.items()
    }


def run_alone(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(words[0], run_name="__main__")
    return int(ended.value.code or 0)


def figures(content: Any) -> Any:
    """JSON content without what may differ."""
    if isinstance(content, dict):
        return {key: figures(v) for key, v in content.items() if key not in CIRCUMSTANCES}
    return [figures(value) for value in content] if isinstance(content, list) else content


def test_two_processes_give_the_figures_and_files_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(REPOSITORY)
    place = make_place(tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    names = list(command_lines(place, one))
    codes = [run_alone(words, monkeypatch) for words in command_lines(place, one).values()]
    assert [name for name, code in zip(names, codes, strict=True) if code] == [
        *("damaged", "comparison", "enlargement")
    ]
    logging.getLogger().handlers.clear()
    commands = [
        {"words": words, "port": free_port()} for words in command_lines(place, two).values()
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    ended = start("scripts", tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended

    assert json.loads((tmp_path / "codes-0.json").read_text()) == codes
    for name in names:
        if name != "damaged":
            read = [json.loads((out / f"{name}.json").read_text()) for out in (one, two)]
            assert read[1]["processes"] == 2
            assert figures(read[0]) == figures(read[1]), name
    files = [sorted(p.relative_to(out) for p in out.rglob("*.png")) for out in (one, two)]
    assert files[0] == files[1] and len(files[0]) == 2 * 5 + 2 * 2
    for file in files[0]:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file

    assert (tmp_path / "stdout-1.txt").read_text() == ""
    assert ended[1][1] == "", "rank 1 says nothing"
    assert not (two / "damaged.json").exists()
    assert "is more than the heaviest upsampler needs" in ended[0][1], "a warning of rank 1"
    problems = [line for line in capsys.readouterr().err.splitlines() if "c.png" in line]
    assert lines(ended[0][1]) == problems and len(problems) == 3
