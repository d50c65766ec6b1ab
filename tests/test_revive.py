"""Training runs that give dead units new weights, and what they say of them."""

import logging
import signal
from pathlib import Path

import pytest
import torch

from engine.unit_probe import Probe
from tests.training import (
    SOAP,
    checkpoint_of,
    differences,
    make_config,
    run,
    stop_at,
    with_dead_units,
)
from utils.checkpoint import load_checkpoint
from utils.errors import UserError


@pytest.fixture(autouse=True)
def few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.reviver.PATCHES", 16)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_revives_resumes_to_the_bit(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    run(make_config("carn", pictures, iter_max=1), tmp_path / "before")
    dead = tmp_path / "dead.pth"
    with_dead_units(tmp_path / "before" / "iter_last.pth", dead)
    config = make_config("carn", pictures, iter_max=5, revive=[0, 3], optimizer=SOAP, ema=ema)
    assert run(config, tmp_path / "straight", init=str(dead)) == 0
    # The signal comes in iteration 2, so that the units of 3 are looked for after the resumption.
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        assert run(config, tmp_path / "resumed", init=str(dead)) == 143
    assert run(config, tmp_path / "resumed") == 0
    straight, resumed = (checkpoint_of(tmp_path / name) for name in ("straight", "resumed"))
    assert not differences(straight, resumed)
    never = make_config("carn", pictures, iter_max=5, optimizer=SOAP, ema=ema)
    assert run(never, tmp_path / "never", init=str(dead)) == 0
    bias = "b1.b1.body.0.bias"
    assert (checkpoint_of(tmp_path / "never")["model"]["sd"][bias][:2] < -900).all()
    assert (straight["model"]["sd"][bias][:2].abs() < 1).all()
    if ema is not None:
        assert (straight["ema"]["sd"][bias][:2].abs() < 1).all(), "of units of old, no average"


def test_what_is_dead_is_told(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fresh_logging: None
) -> None:
    caplog.set_level(logging.INFO)
    run(make_config("carn", pictures, iter_max=1), tmp_path / "before")
    dead = tmp_path / "dead.pth"
    with_dead_units(tmp_path / "before" / "iter_last.pth", dead, "b3.b1.body.2")
    caplog.clear()
    run(make_config("carn", pictures, iter_max=2), tmp_path / "left", init=str(dead))
    (hint,) = [line for line in caplog.messages if "`revive`" in line]
    assert "b3.b1.body.2 2" in hint and "of 576 hidden ReLU units" in hint
    caplog.clear()
    config = make_config("carn", pictures, iter_max=2, revive=[1])
    run(config, tmp_path / "revived", init=str(dead))
    (line,) = [line for line in caplog.messages if "new weights" in line]
    assert line.startswith("iteration 1: ") and "b3.b1.body.2 2" in line
    caplog.clear()
    run(make_config("carn", pictures, iter_max=1, revive=[0, 1, 70]), tmp_path / "late")
    assert "`revive`: 1, 70 not reached" in caplog.messages


def test_phase_1_leaves_what_is_frozen(pictures: Path, tmp_path: Path) -> None:
    run(make_config("carn-phase0", pictures, iter_max=1), tmp_path / "phase0")
    dead = tmp_path / "dead.pth"
    source = tmp_path / "phase0" / "iter_last.pth"
    with_dead_units(source, dead, "heavy_sampler.imnet.layers.2")
    run(
        make_config("carn-phase1", pictures, iter_max=1, revive=[0]), tmp_path / "1", init=str(dead)
    )
    state = checkpoint_of(tmp_path / "1")["model"]["sd"]
    kept = load_checkpoint(dead)["model"]["sd"]
    assert all(torch.equal(state[k], kept[k]) for k in kept if not k.endswith("tracked"))


def test_a_run_that_has_ended_does_not_fail_for_a_hint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> object:
        raise UserError("the samples are gone")

    monkeypatch.setattr("engine.data.TrainBatches.of", gone)
    assert run(make_config("carn", pictures, iter_max=1), tmp_path / "run") == 0
    with pytest.raises(UserError, match="gone"):
        run(make_config("carn", pictures, iter_max=1, revive=[0]), tmp_path / "other")


def test_iterations_that_cannot_be_are_refused(pictures: Path) -> None:
    for value in ([-1], [1.5], 3, ["a"]):
        with pytest.raises(UserError, match="`revive` must be"):
            make_config("carn", pictures, revive=value)


def test_each_time_other_weights_are_drawn(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revive, seeds = Probe.revive, []

    def noted(self: Probe, seed: int) -> dict[str, torch.Tensor]:
        seeds.append(seed)
        return revive(self, seed)

    monkeypatch.setattr(Probe, "revive", noted)
    run(make_config("fsrcnn", pictures, iter_max=3, seed=5, revive=[0, 2]), tmp_path)
    assert seeds == [5, 7]
