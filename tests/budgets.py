"""Budgets for small models, and costs that are not of any model."""

import numpy as np

import models
from engine.budget import Budget, BudgetPlan, OriginalCost
from models.backbones.base import SRNetwork
from models.cost import UpsamplingCost

SHARES = (0.0, 0.02, 0.3, 0.77, 1.0)


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


class Plan(BudgetPlan):
    """A budget for these small models, whose original is CARN with 16 channels."""

    def __init__(self, text: str) -> None:
        original = make_original()
        super().__init__(Budget.parse(text), OriginalCost("carn", original))


def make_original() -> SRNetwork:
    model = models.make({"name": "carn", "args": {"nf": 16, "scale": 4}})
    assert isinstance(model, SRNetwork)
    return model
