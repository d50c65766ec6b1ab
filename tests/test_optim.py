"""Optimisers and schedules by their config names."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.optim import OPTIMIZERS, SCHEDULERS, CosineRestart, load_optimizer
from utils.errors import UserError

ADAM = {"name": "adam", "args": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0}}


def make_adam(*sizes: int, **args: Any) -> torch.optim.Optimizer:
    spec = {"name": "adam", "args": {**ADAM["args"], **args}}  # type: ignore[dict-item]
    return OPTIMIZERS.make(spec, params=[nn.Parameter(torch.zeros(n)) for n in sizes or (1,)])


def schedule(**args: Any) -> CosineRestart:
    spec = {"name": "CosineAnnealingLR_Restart", "args": args}
    return SCHEDULERS.make(spec, optimizer=make_adam())


def rates(scheduler: CosineRestart, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        scheduler.set_step(step)
        found.append(scheduler.optimizer.param_groups[0]["lr"])
    return found


def cosine(step: int, period: int, highest: float = 1e-3, lowest: float = 1e-7) -> float:
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * step / period)) / 2


def test_one_period_is_the_published_cosine() -> None:
    scheduler = schedule(T_period=[2000000], restarts=[2000000], weights=[1], eta_min=1e-7)
    for step in (0, 1, 1_000_000, 1_999_999, 2_000_000):
        assert scheduler.rate(1e-3, step) == pytest.approx(cosine(step, 2_000_000), rel=1e-12)
    assert scheduler.rate(1e-3, 0) == 1e-3
    assert scheduler.rate(1e-3, 2_000_000) == pytest.approx(1e-7)


def test_a_restart_happens_one_step_after_its_number() -> None:
    scheduler = schedule(T_period=[4, 6], restarts=[4], weights=[0.5], eta_min=1e-7)
    expected = [cosine(step, 4) for step in range(5)]
    expected += [cosine(step, 6, highest=0.5e-3) for step in range(6)]
    assert rates(scheduler, 11) == pytest.approx(expected, rel=1e-12)


def test_rate_depends_on_the_step_alone() -> None:
    args: dict[str, Any] = {"T_period": [3, 5, 7], "restarts": [3, 8], "weights": [1, 0.5]}
    straight = rates(schedule(**args), 15)
    jumped = schedule(**args)
    jumped.set_step(9)
    assert jumped.optimizer.param_groups[0]["lr"] == straight[9]
    assert jumped.state_dict() == {"step": 9}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"T_period": []}, "T_period takes positive"),
        ({"T_period": [0]}, "T_period takes positive"),
        ({"T_period": [3, 4]}, "at most one period more"),
        ({"T_period": [3], "restarts": [5, 2], "weights": [1, 1]}, "restarts ascend"),
        ({"T_period": [3], "restarts": [2]}, "1 entries and `weights` 0: one weight per"),
        ({"T_period": [3], "restarts": [2], "weights": [1, 1]}, "1 entries and `weights` 2"),
        (
            {"T_period": [3], "restarts": [2], "weights": [-1]},
            "`lr_scheduler.args.weights` must be above 0",
        ),
        ({"T_period": [3], "eta_min": -1}, "`lr_scheduler.args.eta_min` must be 0 or more, not -1"),
        ({"T_period": 3}, "must be a list of whole numbers, not 3"),
        ({}, "T_period` is missing"),
    ],
)
def test_wrong_schedules_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(**args)


def test_a_rate_that_rises_is_told(caplog: pytest.LogCaptureFixture) -> None:
    schedule(T_period=[3])
    assert "the learning rate rises" not in caplog.text
    schedule(T_period=[3], eta_min=5)
    assert "`lr_scheduler.args.eta_min`, 5, is above the optimizer's lr" in caplog.text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": 0}, "`optimizer.args.lr` must be positive"),
        ({"lr": -1}, "`optimizer.args.lr` must be positive"),
        ({"lr": float("nan")}, "must be a number, not nan"),
        ({"lr": "fast"}, "must be a number, not 'fast'"),
        ({"betas": [0.9]}, "two numbers"),
        ({"betas": [0.9, 2]}, "Invalid beta"),
        ({"momentum": 1}, "unknown key `optimizer.args.momentum`"),
    ],
)
def test_wrong_optimisers_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_adam(**args)


def test_betas_are_the_configs() -> None:
    assert make_adam().param_groups[0]["betas"] == (0.9, 0.99)


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def test_loaded_state_keeps_the_configs_hyper_parameters() -> None:
    saved = stepped(make_adam(2, 3)).state_dict()
    other = make_adam(2, 3, lr=5e-3, betas=[0.8, 0.9])
    load_optimizer(other, saved, Path("x.pth"))
    assert other.param_groups[0]["lr"] == 5e-3 and other.param_groups[0]["betas"] == (0.8, 0.9)
    state = other.state_dict()["state"]
    assert all(torch.equal(state[i]["exp_avg"], saved["state"][i]["exp_avg"]) for i in (0, 1))


def test_loaded_state_takes_the_order_of_memory_of_its_weights() -> None:
    """Fused Adam goes through memory: a run may be resumed with another `channels_last`."""

    def make(order: torch.memory_format) -> tuple[torch.Tensor, torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.rand(4, 3, 2, 2, generator=generator).contiguous(memory_format=order)
        return weight, OPTIMIZERS.make(
            {"name": "adam", "args": {"lr": 0.1}}, params=[weight.requires_grad_()]
        )

    orders = torch.contiguous_format, torch.channels_last
    weight, optimizer = make(orders[0])
    for seed in (1, 2):  # after one step, Adam moves all elements alike
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    found = []
    for order in orders:
        after, other = make(order)
        load_optimizer(other, copy.deepcopy(optimizer.state_dict()), Path("x.pth"))
        after.grad = torch.zeros_like(after)
        other.step()
        found.append(after.detach())
    torch.testing.assert_close(found[1], found[0])


def test_state_of_other_parameters_is_refused() -> None:
    saved = stepped(make_adam(2, 3)).state_dict()
    cases = [
        (make_adam(2), saved, "it holds 2 tensors, the model has 1"),
        (make_adam(2, 4), saved, "another shape"),
        (make_adam(2, 3), {}, "does not fit"),
        (make_adam(2, 3), {**saved, "state": 5}, "does not fit"),
    ]
    for optimizer, state, message in cases:
        with pytest.raises(UserError, match=message):
            load_optimizer(optimizer, state, Path("x.pth"))
