"""benchmarks/training.py, run as a user runs it, on a network that is tiny."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from benchmarks.straightforward import (
    StraightforwardSamples,
    straightforward_batches,
    use_reference,
)
from benchmarks.training_report import Row, bars_table
from datasets.resize import imresize
from engine.objectives import make_objective
from utils.config import load_config
from utils.images import list_images, read_rgb, to_tensor

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "benchmarks" / "training.py"
TRAIN = REPOSITORY / "datasets" / "tiny" / "train"
KEYS = {
    "what",
    "variant",
    "backbone",
    "phase",
    "precision",
    "compile",
    "cache",
    "processes",
    "samples_per_s",
    "step_s_median",
    "iterations_per_s",
    "data_share",
    "machine",
}
MLP = "imnet_spec.args.hidden_list"
TINY = [
    "--backbone=fsrcnn",
    "--set=model.args.encoder_spec.args.d=4",
    f"--set=model.args.heavy_sampler_spec.args.{MLP}=[4]",
    "--batch_size=2",
    "--rounds=1",
    "--seconds=0.01",
    "--device=cpu",
]


def benchmark(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_every_kind_of_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "rows.json"
    words = ["--phase", "0", "--cache", "none", "in_memory", "device", f"--json={target}"]
    threads = torch.get_num_threads()
    assert benchmark(monkeypatch, *TINY, *words, "--threads=1") == 0
    torch.set_num_threads(threads)
    rows = json.loads(target.read_text())
    assert all(set(row) == KEYS for row in rows)
    assert [(row["what"], row["variant"], row["cache"]) for row in rows] == [
        ("data", "straightforward", None),
        ("data", "ours", "none"),
        ("data", "ours", "in_memory"),
        ("data", "ours", "device"),
        ("step", "reference", None),
        ("step", "dense", None),
        ("end_to_end", "straightforward", None),
        ("end_to_end", "ours", "device"),
    ]
    assert all(row["samples_per_s"] > 0 and row["machine"]["torch_threads"] == 1 for row in rows)
    assert all(0 <= row["data_share"] <= 1 for row in rows[6:])
    output = capsys.readouterr().out
    assert "32 sub-images" in output and "threads on" in output
    assert "samples/s, device, 1 processes / straightforward" in output
    assert "step, fsrcnn phase 0: dense fp32 / reference" in output


def test_what_cannot_be_run_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--what", "step", "--phase", "0", "--compile", "graphs", "none"]
    assert benchmark(monkeypatch, *TINY, *words) == 0
    output = capsys.readouterr().out
    assert "left out: step dense fsrcnn phase 0 fp32 graphs: config: `compile: graphs`" in output
    assert benchmark(monkeypatch, "--what", "data", "--data", "no-such-folder") == 2
    assert "no-such-folder does not exist" in capsys.readouterr().err


def test_bars_are_judged() -> None:
    def row(what: str, variant: str, **values: Any) -> Row:
        machine = {"device": "cpu", "bf16_units": True}
        row: dict[str, Any] = dict.fromkeys(KEYS)
        row |= {"processes": 1, "samples_per_s": 1, "compile": "none", "machine": machine}
        return Row(**{**row, "what": what, "variant": variant, **values})

    carn: dict[str, Any] = {"backbone": "carn", "phase": 0, "precision": "fp32"}
    rows = [
        row("data", "straightforward", samples_per_s=100),
        row("data", "ours", cache="device", samples_per_s=900),
        row("step", "reference", step_s_median=1.0, **carn),
        row("step", "dense", step_s_median=0.5, **carn),
        row("step", "dense", step_s_median=0.25, **{**carn, "precision": "bf16"}),
    ]
    lines = bars_table(rows).splitlines()[2:]
    assert [line.split()[-1] for line in lines] == ["missed", "met", "-", "met"]


def test_straightforward_code_computes_what_ours_does(tmp_path: Path) -> None:
    paths = list_images(TRAIN)[:2]
    sample = StraightforwardSamples(paths)[0]
    side = sample["hr"].shape[-1]
    assert sample["coord"].shape == sample["cell"].shape == (side * side, 2)
    pixels = to_tensor(read_rgb(paths[0]))
    assert sample["rgb"].sum(dim=0).allclose(pixels.sum(dim=(1, 2)), rtol=1e-4)
    expected = imresize(sample["hr"], size=(side // 4, side // 4))
    torch.testing.assert_close(sample["lr"], expected, atol=1e-5, rtol=0)
    batch = next(straightforward_batches(paths, 3))
    assert batch["lr"].shape == (3, 3, side // 4, side // 4)


@pytest.mark.parametrize("phase", [0, 1])
def test_reference_step_has_the_gradients_of_ours(phase: int) -> None:
    config = load_config(REPOSITORY / "configs" / f"tiny-pcsr-phase{phase}.yaml")
    generator = torch.Generator().manual_seed(0)
    lr, hr = (torch.rand(2, 3, side, side, generator=generator) for side in (6, 24))
    found = []
    for prepare in (lambda model: model, use_reference):
        torch.manual_seed(0)
        model = prepare(models.make(config.model, data_norm=config.data_norm))
        loss = make_objective(model, loss_rgb_w=1.0, loss_avg_w=1.0)(lr, hr)["loss"]
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(loss, trained))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
