"""Losses, gradients and weights that are not finite."""

import itertools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine.objectives import ReconstructionObjective
from engine.trainer import Trainer
from tests.training import (
    checkpoint_of,
    differences,
    make_config,
    run,
    stop_at,
)
from utils.checkpoint import LAST_NAME, load_checkpoint
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_logging")


def spoil(monkeypatch: pytest.MonkeyPatch, calls: Sequence[int], value: float) -> None:
    """The losses of some iterations, counted from 0, are not finite, and neither are gradients."""
    forward, count = ReconstructionObjective.forward, itertools.count()

    def spoiled(self: ReconstructionObjective, lr: Tensor, hr: Tensor) -> dict[str, Tensor]:
        factor = value if next(count) in calls else 1.0
        return {name: loss * factor for name, loss in forward(self, lr, hr).items()}

    monkeypatch.setattr(ReconstructionObjective, "forward", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_keeps_the_last_good_checkpoint(
    value: float, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, [2], value)
    message = r"training diverged: loss is not finite at iteration 3 \(seed 0\); the last good"
    with pytest.raises(UserError, match=message):
        run(make_config("fsrcnn", pictures, iter_save=1, microbatches=1), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 2


def test_updates_are_left_out_as_often_as_allowed(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Weights, their average, statistics of batch norm and the optimiser stay as they were."""
    keys = {"nan_skip": 2, "ema": 0.9, "microbatches": 1}
    config = make_config("carn", pictures, iter_save=1, keep_last=3, **keys)
    with monkeypatch.context() as patch:
        spoil(patch, [2, 3], float("nan"))
        stop_at(patch, 3, signal.SIGTERM)
        assert run(config, tmp_path) == 143
    before, after = (load_checkpoint(tmp_path / name) for name in ("iter_last.2.pth", LAST_NAME))
    assert (before["iter"], after["iter"], after["skipped"]) == (2, 4, 2)
    for key in ("model", "ema"):
        assert not differences(before[key]["sd"], after[key]["sd"])
    assert not differences(*(c["optimizer"]["sd"]["state"] for c in (before, after)))
    assert "iteration 3 (seed 0): loss is not finite; its update is left out, 1 in a" in caplog.text


def test_one_more_than_allowed_ends_the_run_though_it_was_resumed(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("fsrcnn", pictures, nan_skip=2, microbatches=1)
    with monkeypatch.context() as patch:
        spoil(patch, [1, 2], float("nan"))
        stop_at(patch, 2, signal.SIGTERM)
        assert run(config, tmp_path) == 143
    spoil(monkeypatch, [0], float("nan"))
    with pytest.raises(UserError, match="loss is not finite at iteration 4"):
        run(config, tmp_path)
    assert checkpoint_of(tmp_path)["skipped"] == 2


def test_weights_that_are_not_finite_are_never_saved(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iterate

    def spoil(self: Trainer, step: int, batch: Any) -> Any:
        losses = iterate(self, step, batch)
        if step == 1:
            self.model.get_parameter("tail_conv.bias").data[0] = float("nan")
        return losses

    monkeypatch.setattr(Trainer, "_iterate", spoil)
    with pytest.raises(UserError, match=r"diverged: tail_conv.bias is not finite at iteration 2"):
        run(make_config("fsrcnn", pictures, iter_save=1), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 1


def test_updates_that_are_left_out_are_counted_in_a_row(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, [1, 3], float("nan"))
    config = make_config("fsrcnn", pictures, iter_max=5, nan_skip=1, microbatches=1)
    assert run(config, tmp_path) == 0
    assert "skipped" not in checkpoint_of(tmp_path)
