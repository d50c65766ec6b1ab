"""Weights to begin with, from a network of the same backbone (engine.transplant)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from engine.start import TrainOptions, find_start
from engine.transplant import transplanted
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from tests.processes import REPOSITORY
from tests.training import liif, make_pictures, raw_config
from utils.checkpoint import build_model, load_checkpoint
from utils.config import dump_yaml, load_config
from utils.errors import UserError


def _rcan(nb: int, **more: object) -> dict[str, Any]:
    return {"name": "rcan", "args": {"nf": 8, "ng": 2, "nb": nb, "reduction": 4, **more}}


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the backbone of an original network or of PCSR gives."""
    backbone = model.encoder if isinstance(model, PCSR) else model
    assert isinstance(backbone, SRNetwork)
    return backbone.features(x)


def _pcsr(encoder: dict) -> dict[str, Any]:
    args = {**encoder["args"], "no_upsampling": True}
    return {
        "name": "pcsr-phase0",
        "args": {"encoder_spec": {**encoder, "args": args}, "heavy_sampler_spec": liif([8])},
    }


@pytest.mark.parametrize("blocks", [(1, 3), (2, 3), (2, 2)])
def test_an_original_begins_with_the_features_of_a_shallower_pcsr(blocks: tuple[int, int]) -> None:
    shallow, deep = blocks
    theirs = models.make(_pcsr(_rcan(shallow)))
    own = transplanted(_rcan(deep, scale=4), theirs.state_dict(), "a.pth")
    x = torch.randn(1, 3, 9, 7)
    torch.testing.assert_close(features(own, x), features(theirs, x))
    assert own(x).shape == (1, 3, 36, 28)


def test_added_blocks_learn() -> None:
    theirs = models.make(_pcsr(_rcan(1)))
    own = transplanted(_rcan(2), theirs.state_dict(), "a.pth")
    own(torch.rand(1, 3, 8, 8)).square().mean().backward()
    added = dict(own.named_parameters())["body.1.body.1.body.2.weight"]
    assert added.grad is not None and bool(added.grad.abs().max() > 0)


def test_pcsr_begins_with_the_backbone_of_an_original() -> None:
    spec = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 4}}
    theirs = models.make(spec)
    own = transplanted(_pcsr(spec), theirs.state_dict(), "a.pth")
    x = torch.randn(1, 3, 9, 7)
    torch.testing.assert_close(features(own, x), features(theirs, x))


def test_another_normalisation_is_refused() -> None:
    spec = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 4}}
    norm = {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    theirs = models.make(spec, data_norm=norm)
    with pytest.raises(UserError, match=r"a.pth learned with `data_norm.mean` \[0.5, 0.5, 0.5\]"):
        transplanted(_pcsr(spec), theirs.state_dict(), "a.pth")
    x = torch.randn(1, 3, 9, 7)
    own = transplanted(_pcsr(spec), theirs.state_dict(), "a.pth", norm)
    torch.testing.assert_close(features(own, x), features(theirs, x))


def test_a_spec_may_leave_its_arguments_out() -> None:
    state = models.make({"name": "fsrcnn"}).state_dict()
    assert transplanted({"name": "fsrcnn"}, state, "a.pth") is not None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 4}}, "it has no head.0"),
        (_rcan(2), "it has no body.0.body.1.weight"),
        ({"name": "rcan", "args": {"nf": 12, "ng": 2, "nb": 1, "reduction": 4}}, "instead of"),
    ],
)
def test_other_backbones_are_refused(other: dict[str, Any], said: str) -> None:
    state = models.make(other).state_dict()
    with pytest.raises(UserError, match=said):
        transplanted(_rcan(1), state, "a.pth")


def test_the_command_line_writes_weights_that_training_begins_with(tmp_path: Path) -> None:
    raw = raw_config("fsrcnn", make_pictures(tmp_path / "pictures"))
    path = tmp_path / "deep.yaml"
    path.write_text(dump_yaml({**raw, "model": _rcan(2)}), encoding="utf-8")
    theirs = models.make(_pcsr(_rcan(1)))
    weights, start = tmp_path / "pcsr.pth", tmp_path / "new" / "start.pth"
    torch.save({"model": {**_pcsr(_rcan(1)), "sd": theirs.state_dict()}, "iter": 7}, weights)
    words = ["--weights", str(weights), "--config", str(path), "--out", str(start)]
    ended = subprocess.run(
        [sys.executable, "-m", "engine.transplant", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    x = torch.randn(1, 3, 9, 7)
    own = build_model(load_checkpoint(start), start)
    torch.testing.assert_close(features(own, x), features(theirs, x))
    found = find_start(load_config(path), TrainOptions(tmp_path / "run", init=str(start)))
    assert (found.iteration, found.resumes) == (0, False)
