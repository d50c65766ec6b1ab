"""Budgets in time: what is measured for them, and what becomes of it."""

import time

import numpy as np
import pytest
import torch

from engine.restore import Patches, PcsrRestorer
from engine.timing import ImageTimes, PixelTimes, TimedRouting, measure_times
from models.cost import ImageCost, UpsamplingCost, count_rows
from tests.budgets import Plan, some_cost
from tests.test_fast import make_model
from utils.errors import UserError


def test_times_of_pure_and_mixed_classes_are_reproduced() -> None:
    image = ImageCost(some_cost(7, 3), patches=2, lr_size=(2, 2), size=(7, 5))
    mixed = count_rows(torch.randint(0, 3, (2, 7, 5), dtype=torch.uint8), 3)
    pure_s = [1.0, 2.0, 4.0]
    cost = PixelTimes.fit(image, pure_s, 5.0, mixed).cost(image, fixed_s=0.5)
    assert [cost.uniform(j, (7, 5), 2) for j in range(3)] == pytest.approx([2.0, 3.0, 5.0])
    assert cost.total(mixed) == pytest.approx(6.0)


def test_time_that_has_passed_is_gone(caplog) -> None:
    margins = torch.randn(1, 1, 20, 20)
    times = ImageTimes(0.0, UpsamplingCost(0.0, (0.0, 1.0), (0,), np.zeros((1, 2))), 0.0, 400.0)
    routing = TimedRouting(times, 100.5, "words")
    assert routing.classes(margins, (-1.0, -0.5)).sum() == 100
    late = TimedRouting(times, 0.05, "words")
    time.sleep(0.06)
    assert not caplog.records
    assert not late.classes(margins, (-1.0, -0.5)).any()
    assert "words: will be late by about" in caplog.text


@pytest.mark.parametrize("patches", [None, Patches(batch_size=1)], ids=["whole", "patches"])
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_time_is_measured_once_for_each_size(upsamplers, patches, monkeypatch) -> None:
    """How well it is met depends on the machine; here only that it is measured and used."""
    monkeypatch.setattr("engine.timing._LEAST_PX", 700)
    monkeypatch.setattr("engine.timing._LEAST_S", 0.0)
    lr, size = torch.rand(3, 88, 32), (352, 128)
    model = make_model("fsrcnn", upsamplers)
    times = measure_times(PcsrRestorer(model, patches=patches), lr, size)
    assert 0 < times.least_s <= times.most_s
    calls = 0

    def count(*_: object) -> ImageTimes:
        nonlocal calls
        calls += 1
        return times

    monkeypatch.setattr("engine.budget.measure_times", count)
    restorer = PcsrRestorer(model, Plan("1000s"), patches=patches)
    assert restorer(lr, size).shares[-1] == 1.0
    assert restorer(lr, size).shares[-1] == 1.0
    assert calls == 1
    with pytest.raises(UserError, match=r"this image takes about [\d.]+ms"):
        PcsrRestorer(model, Plan("0.001ms"), patches=patches)(lr, size)


def test_warming_up_knows_no_budget() -> None:
    restorer = PcsrRestorer(make_model("carn"), Plan("0.0001"))
    lr = torch.rand(3, 9, 7)
    restorer.warm_up(lr, (36, 28))
    with pytest.raises(UserError, match="too little"):
        restorer(lr, (36, 28))


def test_what_the_routing_will_take_is_gone_as_well() -> None:
    cost = UpsamplingCost(0.0, (0.0, 1.0), (0,), np.zeros((1, 2)))
    routing = TimedRouting(ImageTimes(60.0, cost, 0.0, 400.0), 100.5, "words")
    assert routing.classes(torch.randn(1, 1, 20, 20), (-1.0, -0.5)).sum() == 40


@pytest.mark.parametrize(("most_kept", "again_s"), [(10**9, 0.0), (0, 7.0)])
def test_an_encoder_that_runs_once_more_takes_its_time(most_kept, again_s, monkeypatch) -> None:
    monkeypatch.setattr("models.inference.KEPT_FEATURES", most_kept)
    monkeypatch.setattr("engine.timing._encode_s", lambda *_: 7.0)
    restorer = PcsrRestorer(make_model("fsrcnn"))
    times = measure_times(restorer, torch.rand(3, 40, 32), (160, 128))
    assert times.after.fixed == again_s
    assert (times.least_s > 7.0) == (again_s > 0)
