"""Budgets: how exactly they are met, in which order pixels are raised, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from models.budget import BudgetRouting, raise_order
from models.cost import UpsamplingCost, count_rows
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Engine, super_resolve, super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import KRouting
from tests.test_fast import make_model
from utils.errors import UserError
from utils.flops import PcsrCost

SHARES = (0.0, 0.02, 0.3, 0.77, 1.0)


# In which order pixels are raised


def some_cost(rows: int, upsamplers: int, *, strip: float = 0.0) -> UpsamplingCost:
    """1, 3, 9 a pixel, strips of two rows."""
    starts = tuple(range(0, rows, 2))
    per_strip = strip * np.arange(upsamplers, dtype=np.float64)
    return UpsamplingCost(
        100.0, (1.0, 3.0, 9.0)[:upsamplers], starts, np.tile(per_strip, (len(starts), 1))
    )


def between(cost: UpsamplingCost, size: tuple[int, int], share: float, patches: int = 1) -> float:
    """The budget so far on the way from all-light to all-heavy."""
    light, heavy = (cost.uniform(index, size, patches) for index in (0, -1))
    return light + share * (heavy - light)


def one_by_one(
    margins: Tensor, slopes: tuple[float, ...], cost: UpsamplingCost, budget: float
) -> np.ndarray:
    """The classes, by raising one pixel after the other."""
    kappa = raise_order(margins, slopes).numpy()
    raises = sorted((-kappa[b, k, y, x], b, y, x) for b, k, y, x in np.ndindex(kappa.shape))
    classes = np.zeros((len(kappa), *kappa.shape[2:]), np.uint8)
    raised = classes
    for index, raise_ in enumerate(raises):
        raised = raised.copy()
        raised[raise_[1:]] += 1
        if raise_ in raises[index + 1 : index + 2]:  # over two classes at once
            continue
        if cost.total(count_rows(torch.from_numpy(raised), kappa.shape[1] + 1)) > budget:
            break
        classes = raised
    return classes


@pytest.mark.parametrize("upsamplers", [2, 3])
@pytest.mark.parametrize("strip", [0.0, 7.0])
@pytest.mark.parametrize("steps", [None, 2, 0], ids=["distinct", "ties", "all-equal"])
def test_largest_margins_first_then_pixel_order(upsamplers, strip, steps, monkeypatch) -> None:
    monkeypatch.setattr("models.budget._GATHERED", 9)
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(2, upsamplers - 1, 7, 5, generator=generator).cumsum(1)
    if steps is not None:
        margins = (margins * steps).round()
    slopes = (-2.0, -1.5, -1.2)[:upsamplers]
    cost = some_cost(7, upsamplers, strip=strip)
    for share in (0.0, 0.1, 0.5, 0.93, 0.999):
        budget = between(cost, (7, 5), share, patches=2)
        classes = BudgetRouting(cost, budget).classes(margins, slopes)
        assert classes.dtype == torch.uint8
        np.testing.assert_array_equal(classes, one_by_one(margins, slopes, cost, budget))


@pytest.mark.parametrize("upsamplers", [2, 3, 4])
def test_the_order_is_that_of_k(upsamplers) -> None:
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(1, upsamplers - 1, 20, 20, generator=generator)
    slopes = (-2.0, -1.5, -1.2, -0.1)[:upsamplers]
    kappa = raise_order(margins, slopes)
    for k in (-3.0, 0.0, 0.7, 2.0):
        threshold = k * 0.5 if upsamplers == 2 else k
        classes = (kappa > threshold).sum(dim=1)
        assert torch.equal(classes, KRouting(k).classes(margins, slopes).long())


def test_more_budget_never_lowers_a_class() -> None:
    margins = torch.randn(1, 2, 30, 20, generator=torch.Generator().manual_seed(0))
    cost = some_cost(30, 3, strip=50.0)
    budgets = [between(cost, (30, 20), share) for share in np.linspace(0, 1, 12)]
    maps = [BudgetRouting(cost, b).classes(margins, (-2.0, -1.5, -1.2)) for b in budgets]
    assert all((after >= before).all() for before, after in pairwise(maps))
    assert not maps[0].any()
    assert (maps[-1] == 2).all()


def test_equal_costs_and_pixels_without_a_margin() -> None:
    """No division by zero; pixels that cannot be ordered stay light."""
    margins = torch.tensor([[[[0.0, 1.0, torch.nan]], [[0.0, -1.0, torch.nan]]]])
    cost = some_cost(1, 3)
    classes = BudgetRouting(cost, between(cost, (1, 3), 0.99)).classes(margins, (-1.0, -1.0, -0.5))
    assert classes[0, 0, 2] == 0


def test_upsamplers_out_of_order_are_refused() -> None:
    with pytest.raises(UserError, match="light to heavy"):
        BudgetRouting(some_cost(1, 2), 1e9).classes(torch.zeros(1, 1, 1, 1), (-1.0, -2.0))


# What engines execute is what was predicted


def engine_of(name: str, model: PCSR) -> Engine:
    """An engine with small blocks and runs, so that small images have many."""
    if name == "reference":
        return ReferenceEngine(model)
    return FastEngine(model, block_px=40, chunk_px=60, run_px=15)


@pytest.mark.parametrize("engine_name", ["fast", "reference"])
@pytest.mark.parametrize("size", [(36, 28), (25, 30), (5, 40)])
@pytest.mark.parametrize(
    ("backbone", "upsamplers"), [("fsrcnn", 2), ("carn", 3), ("rcan", 2), ("srresnet", 2)]
)
def test_flops_meet_the_budget(backbone, upsamplers, size, engine_name) -> None:
    model = make_model(backbone, upsamplers)
    engine = engine_of(engine_name, model)
    lr = torch.rand(1, 3, 9, 7)
    log_costs = PcsrCost.of(model).log_costs((9, 7), size)
    runs = engine.run_rows((9, 7))
    assert runs == [feat.shape[2] for feat in engine.encode_rows(lr)]
    cost = engine.cost(PixelGrid.build((9, 7), size), runs)
    for share in SHARES:
        budget = between(cost, size, share)
        result = super_resolve(engine, lr, size, BudgetRouting(cost, budget), log_costs)
        assert result.mlp_flops == cost.total(count_rows(result.classes, upsamplers))
        one_more = max(cost.pixel) + 2 * cost.strip.max()
        assert budget - one_more < result.mlp_flops <= budget


@pytest.mark.parametrize("engine_name", ["fast", "reference"])
def test_flops_of_patches_count_overlaps(engine_name) -> None:
    model = make_model("carn")
    engine = engine_of(engine_name, model)
    lr = torch.rand(1, 3, 60, 32)
    cost = engine.cost(PixelGrid.build((32, 32), (128, 128)), [32])
    log_costs = PcsrCost.of(model).log_costs((60, 32), (240, 128))
    for share in SHARES:
        budget = between(cost, (128, 128), share, patches=2)
        routing = BudgetRouting(cost, budget)
        result = super_resolve_patches(engine, lr, 4, routing, log_costs, patch_batch_size=1)
        assert budget * 0.999 < result.mlp_flops <= budget
