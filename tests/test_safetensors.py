"""Weights as .safetensors files: written, read in the place of checkpoints, and refused."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import models
from tests.processes import REPOSITORY
from tests.training import model_spec
from utils.average import average
from utils.checkpoint import build_model, load_checkpoint, save_checkpoint
from utils.cli import run
from utils.convert import for_inference, main
from utils.errors import UserError


def write(path: Path, kind: str = "carn-phase1", **more: Any) -> Path:
    torch.manual_seed(1)
    spec = model_spec(kind)
    model = models.make(spec)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = model.state_dict()
    save_checkpoint(path, {"model": {**spec, "sd": state}, "iter": 30, **more})
    return path


def code_of(script: Callable[[], Any], words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A script's exit code."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        script()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("kind", ["fsrcnn", "carn", "carn-phase1"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", kind)
    first = load_checkpoint(path)
    save_checkpoint(tmp_path / "b.safetensors", for_inference(path))
    save_checkpoint(tmp_path / "c.pth", for_inference(tmp_path / "b.safetensors"))
    for other in ("b.safetensors", "c.pth"):
        found = load_checkpoint(tmp_path / other)
        assert found["iter"] == 30
        assert {k: v for k, v in found["model"].items() if k != "sd"} == model_spec(kind)
        assert found["model"]["sd"].keys() == first["model"]["sd"].keys()
        for key, value in first["model"]["sd"].items():
            assert torch.equal(found["model"]["sd"][key], value)


def test_averages_over_iterations_take_the_weights_place(tmp_path: Path) -> None:
    plain = load_checkpoint(write(tmp_path / "a.pth", "fsrcnn"))["model"]["sd"]
    ema = {key: value + 1 for key, value in plain.items() if not key.startswith("norm.")}
    found = for_inference(write(tmp_path / "b.pth", "fsrcnn", ema={"sd": ema}))
    assert "ema" not in found
    assert all(torch.equal(found["model"]["sd"][key], value) for key, value in ema.items())


def test_scripts_take_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.pth", "fsrcnn")
    other = tmp_path / "sub" / "a.safetensors"
    convert = ["convert", str(path), f"--out={other}"]
    assert code_of(lambda: run(main), convert, monkeypatch) == 0
    assert f"{other}: fsrcnn, " in capsys.readouterr().out
    figures = []
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"model": model_spec("fsrcnn")}))
    for weights in (path, other):
        words = ["test.py", f"--config={config}", f"--weights={weights}", "--device=cpu"]
        words += [
            f"--hr_data={REPOSITORY / 'datasets/tiny/valid'}",
            f"--json={tmp_path / 'f.json'}",
        ]
        script = partial(runpy.run_path, str(REPOSITORY / words[0]), run_name="__main__")
        assert code_of(script, words, monkeypatch) == 0
        figures.append(json.loads((tmp_path / "f.json").read_text())["mean"]["psnr"])
    assert figures[0] == figures[1]
    # What is there is not replaced.
    assert code_of(lambda: run(main), convert, monkeypatch) == 2
    assert "exists: name a new file" in capsys.readouterr().err


def test_files_of_others(tmp_path: Path) -> None:
    spec, path = model_spec("fsrcnn"), tmp_path / "bare.safetensors"
    state = models.make(spec).state_dict()
    save_file(state, path)
    found = load_checkpoint(path)
    assert found["model"].keys() == {"sd"}
    build_model({"model": {**spec, **found["model"]}}, path)
    with pytest.raises(UserError, match="holds no model spec: name its config with --config"):
        for_inference(path)


def test_a_mean_can_be_written_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", "fsrcnn")
    save_checkpoint(tmp_path / "mean.safetensors", average([path, path]))
    with safe_open(tmp_path / "mean.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"]) == model_spec("fsrcnn")


@pytest.mark.parametrize(
    "about", [{"model": "[", "iter": "1"}, {"model": "[1]", "iter": "1"}, {"model": "{}"}]
)
def test_odd_metadata_are_refused(about: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=about)
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or not a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("damage", ["short", "empty", "torch"])
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, for_inference(write(tmp_path / "a.pth", "fsrcnn")))
    whole = path.read_bytes()
    content = {"short": whole[:-9], "empty": b"", "torch": (tmp_path / "a.pth").read_bytes()}
    path.write_bytes(content[damage])
    with pytest.raises(UserError, match=r"a\.safetensors is damaged or not a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint = for_inference(write(tmp_path / "a.pth", "fsrcnn"))
    save_checkpoint(path, checkpoint)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: load_checkpoint(path),
        lambda: save_checkpoint(tmp_path / "b.safetensors", checkpoint),
    ):
        with pytest.raises(UserError, match="pip install safetensors"):
            call()
    assert not (tmp_path / "b.safetensors").exists()
