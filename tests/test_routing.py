"""Routing: k, the automatic threshold, and the inputs that have no spread or no second pixel."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.routing import (
    AdaptiveRouting,
    FixedRouting,
    HeavyScores,
    KRouting,
    Routing,
    lloyd_threshold,
    relative_to_lightest,
)
from utils.errors import UserError

CARN_COSTS = (math.log(0.3188), math.log(0.6812))


def margin_logits(margin_BHW: Tensor) -> Tensor:
    """(B, 2, H, W) logits with the given heavy minus light margin."""
    return torch.stack([torch.zeros_like(margin_BHW), margin_BHW], dim=1)


def test_k_divides_probability_by_a_power_of_the_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 9, 7, generator=generator)
    costs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    for k in (-3.0, 0.0, 0.7, 2.0):
        expected = (logits.softmax(1) / costs[:, None, None] ** k).argmax(1)
        classes = KRouting(k).classes(relative_to_lightest(logits), costs.log().tolist())
        assert classes.dtype == torch.uint8
        assert torch.equal(classes.long(), expected)


def test_k_margin_rule_and_ties_to_the_lighter() -> None:
    threshold = np.float32(CARN_COSTS[1] - CARN_COSTS[0])
    above = np.nextafter(threshold, np.float32(9))
    margin = torch.tensor([[[threshold, above]]])
    assert KRouting(1).classes(
        relative_to_lightest(margin_logits(margin)), CARN_COSTS
    ).tolist() == [[[0, 1]]]
    assert (
        KRouting(0)
        .classes(relative_to_lightest(torch.zeros(1, 3, 1, 1)), (-1.2, -1.1, -1.0))
        .item()
        == 0
    )


@pytest.mark.parametrize("k", [25.0, 1e30, 1e308])
def test_k_large(k: float) -> None:
    logits = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    log_costs = (math.log(0.1), math.log(0.3), math.log(0.6))
    assert (KRouting(k).classes(relative_to_lightest(logits), log_costs) == 0).all()
    assert (KRouting(-k).classes(relative_to_lightest(logits), log_costs) == 2).all()


@pytest.mark.parametrize("k", [math.nan, math.inf, -math.inf])
def test_k_must_be_finite(k: float) -> None:
    with pytest.raises(UserError, match=f"--k {k}"):
        KRouting(k)


def test_fixed_counts_from_either_end() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    for index, expected in [(0, 0), (1, 1), (-1, 2)]:
        classes = FixedRouting(index).classes(relative_to_lightest(logits), (-1.2, -1.1, -1.0))
        assert classes.tolist() == [[[expected] * 2] * 2]


def test_adaptive_is_the_published_clustering() -> None:
    """Against fast_pytorch_kmeans with one start centroid, on images of very different spread."""
    kmeans = pytest.importorskip("fast_pytorch_kmeans")
    generator = torch.Generator().manual_seed(0)
    for pixels, spread, offset in [(7, 1, 0), (500, 3, 0), (70_000, 1, 4), (70_000, 6, -3)]:
        margin = offset + spread * torch.randn(1, 1, pixels, generator=generator)
        scores = next(iter(HeavyScores(margin[:, None]))).view(-1, 1)
        clusterer = kmeans.KMeans(n_clusters=2, mode="euclidean", max_iter=20)
        labels = clusterer.fit_predict(scores, centroids=torch.tensor([[0.5]]))
        expected = labels != labels[scores.argmin()]
        classes = (
            AdaptiveRouting()
            .classes(relative_to_lightest(margin_logits(margin)), CARN_COSTS)
            .flatten()
            .bool()
        )
        assert (classes == expected).double().mean() > 0.9999
        assert 0 < classes.double().mean() < 1


def test_adaptive_looks_at_all_patches_together() -> None:
    margin = torch.linspace(-4, 4, 48).view(1, 6, 8)
    together = AdaptiveRouting().classes(relative_to_lightest(margin_logits(margin)), CARN_COSTS)
    patches = AdaptiveRouting().classes(
        relative_to_lightest(margin_logits(margin.view(3, 2, 8))), CARN_COSTS
    )
    assert torch.equal(patches.view(1, 6, 8), together)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 4)])
@pytest.mark.parametrize("value", [-100.0, 0.0, 100.0, math.nan])
def test_adaptive_without_spread_is_light(size: tuple[int, int], value: float) -> None:
    logits = margin_logits(torch.full((1, *size), value))
    assert (AdaptiveRouting().classes(relative_to_lightest(logits), CARN_COSTS) == 0).all()


def test_adaptive_separates_two_values() -> None:
    scores = HeavyScores(torch.tensor([-1.0, 3.0, -1.0]).view(1, 1, 1, 3))
    assert 0 < lloyd_threshold(scores.histogram()) < 1


def test_adaptive_is_for_two_upsamplers() -> None:
    with pytest.raises(UserError, match="2 upsamplers and this model has 3"):
        AdaptiveRouting().classes(relative_to_lightest(torch.zeros(1, 3, 2, 2)), (-1.0, -1.0, -1.0))


@pytest.mark.golden
def test_golden_class_maps(shared: Path) -> None:
    golden = np.load(shared / "published" / "butterfly_crop.npz")
    logits = margin_logits(torch.from_numpy(golden["margin_heavy_minus_light"])[None])
    policies: dict[str, Routing] = {
        "k0": KRouting(0),
        "k1": KRouting(1),
        "adaptive": AdaptiveRouting(),
    }
    for name, routing in policies.items():
        classes = routing.classes(relative_to_lightest(logits), CARN_COSTS)[0].numpy()
        assert (classes == golden[f"{name}_class"]).mean() >= 0.9999, name


def test_lloyds_iterations_end_after_the_published_number() -> None:
    """On scores whose upper tail lets the threshold go on for longer."""
    scores = torch.arange(2**16, dtype=torch.float64) / 2**16
    counts = (scores + 0.02) ** -4 * (4 * scores).exp()
    thresholds, light, heavy = [], 0.0, float((counts * scores).sum() / counts.sum())
    for _ in range(21):
        thresholds.append((light + heavy) / 2)
        upper = scores > thresholds[-1]
        light, heavy = (
            float((counts * scores)[part].sum() / counts[part].sum()) for part in (~upper, upper)
        )
    found = lloyd_threshold(torch.stack([counts, counts * scores]))
    assert found == pytest.approx(thresholds[18], abs=1e-9)
    assert abs(thresholds[19] - found) > 1e-3
