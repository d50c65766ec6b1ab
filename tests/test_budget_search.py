"""In which order pixels are raised, and how far a budget reaches."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from engine.restore import PcsrRestorer
from models.budget import BudgetRouting, raise_order
from models.cost import UpsamplingCost, count_rows, count_rows_above
from models.fast import FastEngine
from models.pcsr import PCSR
from models.routing import KRouting
from tests.budgets import between, some_cost
from tests.training import liif
from utils.errors import UserError


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
    # So that a small image is searched as a large one is.
    for name, value in (("GATHERED", 9), ("GATHERED_AT_ONCE", 3), ("ENOUGH", 20), ("GUESSES", 4)):
        monkeypatch.setattr(f"models.budget_search._{name}", value)
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


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0], ids=["even", "normal", "heavy-tailed"])
def test_a_search_looks_at_the_image_a_few_times(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def count(maps: Tensor, thresholds: list[float]) -> np.ndarray:
        looks.append(thresholds)
        return count_rows_above(maps, thresholds)

    monkeypatch.setattr("models.budget_search.count_rows_above", count)
    generator = torch.Generator().manual_seed(0)
    margins = torch.rand(1, 1, 600, 500, generator=generator)
    if spread:
        margins = (spread * torch.randn(1, 1, 600, 500, generator=generator)).sinh()
    cost = some_cost(600, 2, strip=100.0)
    for share in (0.03, 0.5, 0.97):
        looks.clear()
        BudgetRouting(cost, between(cost, (600, 500), share)).classes(margins, (-2.0, -1.0))
        assert len(looks) <= 8


@pytest.mark.parametrize("size", [(300, 448), (170, 250)])
@pytest.mark.parametrize("share", [0.002, 0.01, 0.05])
def test_budgets_near_the_least_are_met_without_compiled_kernels(
    size: tuple[int, int], share: float
) -> None:
    """FSRCNN's first layers cost so much that they have to be counted row by row."""
    hidden: tuple[list[int], ...] = ([10] * 3, [58] * 4, [])
    encoder = {"name": "fsrcnn", "args": {"d": 48, "no_upsampling": True}}
    light, heavy, classifier = map(liif, hidden)
    args = {"encoder_spec": encoder, "upsampler_specs": [light, heavy]}
    model = models.make({"name": "pcsr", "args": {**args, "classifier_spec": classifier}}).eval()
    assert isinstance(model, PCSR)
    restorer = PcsrRestorer(model)
    restorer.engine = FastEngine(model)
    image = restorer.image_cost((75, 112), size)
    budget = image.uniform(0) + share * (image.uniform(-1) - image.uniform(0))
    margins = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    classes = BudgetRouting(image.cost, budget).classes(margins, (-2.0, -1.0))
    assert 0.995 * budget <= image.cost.total(count_rows(classes, 2)) <= budget


def test_equal_costs_and_pixels_without_a_margin() -> None:
    """No division by zero; pixels that cannot be ordered stay light."""
    margins = torch.tensor([[[[0.0, 1.0, torch.nan]], [[0.0, -1.0, torch.nan]]]])
    cost = some_cost(1, 3)
    classes = BudgetRouting(cost, between(cost, (1, 3), 0.99)).classes(margins, (-1.0, -1.0, -0.5))
    assert classes[0, 0, 2] == 0


def test_upsamplers_out_of_order_are_refused() -> None:
    with pytest.raises(UserError, match="light to heavy"):
        BudgetRouting(some_cost(1, 2), 1e9).classes(torch.zeros(1, 1, 1, 1), (-1.0, -2.0))


def test_no_pixel_is_raised_to_an_upsampler_that_is_no_better_for_the_same_cost() -> None:
    kappa = raise_order(torch.zeros(1, 2, 1, 1), (-2.0, -1.0, -1.0))
    assert kappa.flatten().tolist() == [0.0, -math.inf]
