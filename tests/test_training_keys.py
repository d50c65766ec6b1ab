"""Config keys of the training step: what they promise, and that they resume to the bit."""

import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from engine.compiled import compiled
from engine.ema import Ema
from engine.gradients import BatchGradients
from engine.objectives import make_objective
from engine.optim import OPTIMIZERS, SCHEDULERS, WarmUp
from engine.trainer import Trainer
from tests.training import (
    KEYS,
    ONE,
    checkpoint_of,
    differences,
    make_config,
    metrics_of,
    model_spec,
    run,
    stop_at,
)
from utils.checkpoint import LAST_NAME, build_model, load_checkpoint
from utils.errors import UserError
from utils.release import release

pytestmark = pytest.mark.usefixtures("fresh_logging")


def test_with_every_key_resumed_equals_straight_through(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("fsrcnn", pictures, iter_max=4, **KEYS)
    assert run(config, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 1, signal.SIGTERM)
        assert run(config, tmp_path / "resumed") == 143
    assert run(config, tmp_path / "resumed") == 0
    straight, resumed = (checkpoint_of(tmp_path / name) for name in ("straight", "resumed"))
    assert not differences(straight, resumed)
    assert differences(straight["ema"]["sd"], straight["model"]["sd"])


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("kind", ["fsrcnn", "fsrcnn-phase1", "carn-phase1"])
def test_parts_one_after_another_give_the_gradient_of_the_whole(
    kind: str, microbatches: int
) -> None:
    """In float64, where only a mistake differs; phase 1's load is that of all parts."""
    outcomes = []
    for rounds in (1, 4):
        torch.manual_seed(0)
        model = models.make(model_spec(kind)).double().train()
        lr, hr = torch.rand(8, 3, 6, 6).double(), torch.rand(8, 3, 24, 24).double()
        trained = [p for p in model.parameters() if p.requires_grad]
        with BatchGradients(
            make_objective(model, loss_rgb_w=1, loss_avg_w=3),
            trained,
            world=ONE,
            batch_size=8,
            microbatches=microbatches if rounds > 1 else 1,
            rounds=rounds,
        ) as gradients:
            losses = [gradients(lr, hr) for _ in range(2)][-1]
        outcomes.append([*losses.values(), *(p.grad for p in trained)])
    for value, whole in zip(*outcomes, strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-8, check_dtype=False)


def test_parts_that_cannot_be_are_refused(pictures: Path, tmp_path: Path) -> None:
    for kind, count, message in (
        ("fsrcnn", 3, "`accumulate` is 3, which does not divide the batch of 4$"),
        ("carn", 2, "its batch norm needs the whole batch at once"),
    ):
        with pytest.raises(UserError, match=message):
            run(make_config(kind, pictures, accumulate=count), tmp_path)


def test_gradients_are_clipped_to_a_norm_and_their_own_is_logged(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    iterate = Trainer._iterate

    def note(self: Trainer, step: int, batch: Any) -> Any:
        losses = iterate(self, step, batch)
        grads = [p.grad.flatten() for p in self.state.trained if p.grad is not None]
        norms.append((losses["grad_norm"].item(), torch.cat(grads).norm().item()))
        return losses

    monkeypatch.setattr(Trainer, "_iterate", note)
    run(make_config("fsrcnn", pictures, iter_max=2, grad_clip=0.01), tmp_path)
    assert all(own > 0.1 and clipped == pytest.approx(0.01, rel=1e-3) for own, clipped in norms)
    logged = metrics_of(tmp_path)[0]["grad_norm"]
    assert logged == pytest.approx(math.fsum(own for own, _ in norms) / 2)


def test_an_average_that_is_dropped_is_told(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2, ema=0.5), tmp_path)
    assert "are dropped" not in caplog.text
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path)
    assert "holds averaged weights (`ema`), the config wants none: they are dropped" in caplog.text


def test_the_average_follows_the_weights_and_is_what_is_released(
    pictures: Path, tmp_path: Path
) -> None:
    run(make_config("fsrcnn", pictures, iter_max=3, ema=0.5), tmp_path)
    checkpoint = load_checkpoint(tmp_path / LAST_NAME)
    average = checkpoint["ema"]["sd"]
    assert average.keys() <= checkpoint["model"]["sd"].keys()
    assert all(value.dtype == torch.float32 for value in average.values())
    for weights in (
        load_checkpoint(release(tmp_path))["model"]["sd"],
        build_model(checkpoint, "x").state_dict(),
    ):
        assert not differences({key: weights[key] for key in average}, average)


def test_an_average_is_exponential_and_gives_the_weights_back() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm2d(1)).requires_grad_(True)
    weight = model.get_parameter("0.weight")
    weight.data.fill_(0)
    ema = Ema(model, 0.9)
    weight.data.fill_(1)
    ema.update(1000)
    assert ema.state_dict()["0.weight"].item() == pytest.approx(0.1)
    ema.update(0)
    assert ema.state_dict()["0.weight"].item() == pytest.approx(0.91)
    with ema.applied():
        assert weight.item() == pytest.approx(0.91)
    assert weight.item() == 1
    assert "1.running_mean" in ema.state_dict() and "1.num_batches_tracked" not in ema.state_dict()


def test_the_rate_warms_up_on_top_of_the_schedule() -> None:
    adam = {"name": "adam", "args": {"lr": 1.0}}
    optimizer = OPTIMIZERS.make(adam, params=[nn.Parameter(torch.zeros(1))])
    spec = {"name": "CosineAnnealingLR_Restart", "args": {"T_period": [10]}}
    schedule = SCHEDULERS.make(spec, optimizer=optimizer)
    warm = WarmUp(schedule, 4)
    for step in (3, 0, 1, 2, 7, 2):
        warm.set_step(step)
        rate = schedule.rate(1.0, step) * min(1, (step + 1) / 4)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-12)


def test_adam_is_fused_unless_the_config_says_otherwise() -> None:
    parameters = [nn.Parameter(torch.zeros(3))]
    for args, fused, foreach in (({}, True, None), ({"fused": False}, False, None)):
        spec = {"name": "adam", "args": {"lr": 1.0, **args}}
        group = OPTIMIZERS.make(spec, params=parameters).param_groups[0]
        assert (group["fused"], group["foreach"]) == (fused, foreach)
    spec = {"name": "adam", "args": {"lr": 1.0, "foreach": True}}
    assert OPTIMIZERS.make(spec, params=parameters).param_groups[0]["foreach"]


def test_compiling_is_refused_in_one_line_where_it_cannot_be(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="`compile: graphs` is for CUDA GPUs"):
        run(make_config("fsrcnn", pictures, compile="graphs"), tmp_path)
    with pytest.raises(UserError, match="`compile` and `microbatches` do not go together"):
        run(make_config("fsrcnn", pictures, compile="default", microbatches=2), tmp_path)

    class Scale(nn.Module):
        def forward(self, lr: torch.Tensor, hr: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (lr * hr).sin().mean()}

    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    call = compiled(Scale(), "default", torch.device("cpu"))
    assert call is not None
    with pytest.raises(UserError, match="`compile: default` needs a working compiler") as caught:
        call(torch.rand(2, 3), torch.rand(2, 3))
    assert "\n" not in str(caught.value)


def test_an_average_begins_at_the_weights_that_a_run_begins_with(
    pictures: Path, tmp_path: Path
) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path / "before")
    config = make_config("fsrcnn", pictures, iter_max=1, seed=1, ema=0.9)
    run(config, tmp_path / "after", init=str(tmp_path / "before" / LAST_NAME))
    checkpoint = checkpoint_of(tmp_path / "after")
    for key, value in checkpoint["ema"]["sd"].items():
        # One step of Adam moves a weight by the rate, 1e-3.
        torch.testing.assert_close(value, checkpoint["model"]["sd"][key], rtol=0, atol=1e-3)
