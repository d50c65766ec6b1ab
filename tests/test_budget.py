"""Budgets: how exactly they are met, in which order pixels are raised, and what is refused."""

import logging
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from engine.budget import Budget, BudgetPlan, OriginalCost
from engine.inference_words import add_routing_words, routing_from
from engine.loading import load_pcsr
from engine.restore import Patches, PcsrRestorer
from engine.timing import ImageTimes, PixelTimes, TimedRouting, measure_times
from models.backbones.base import SRNetwork
from models.budget import BudgetRouting, raise_order
from models.cost import ImageCost, UpsamplingCost, count_rows, count_rows_above
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Engine, super_resolve
from models.patches import super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import AdaptiveRouting, KRouting
from tests.test_fast import make_model
from tests.training import liif
from utils.cli import Parser
from utils.config import load_config
from utils.errors import UserError
from utils.flops import PcsrCost, executed_flops

CONFIGS = Path(__file__).parent.parent / "configs"
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
    # So that a small image is searched as a large one is.
    for name, value in (("GATHERED", 9), ("GATHERED_AT_ONCE", 3), ("ENOUGH", 20), ("GUESSES", 4)):
        monkeypatch.setattr(f"models.budget._{name}", value)
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

    monkeypatch.setattr("models.budget.count_rows_above", count)
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


# Budgets as users give them


@pytest.mark.parametrize(
    ("text", "amount", "unit", "words"),
    [
        ("0.6", 0.6, "share", "budget 0.6 of the original's executed FLOPs"),
        ("60G", 60e9, "flops", "budget 60 GFLOPs executed per image"),
        ("500M", 0.5e9, "flops", "budget 0.5 GFLOPs executed per image"),
        ("1.5T", 1.5e12, "flops", "budget 1500 GFLOPs executed per image"),
        ("250ms", 0.25, "seconds", "budget 250 ms per image"),
        (".25s", 0.25, "seconds", "budget 250 ms per image"),
    ],
)
def test_budgets_are_read(text, amount, unit, words) -> None:
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit) == (pytest.approx(amount), unit)
    assert budget.describe() == words


@pytest.mark.parametrize("text", ["", "0", "-1", "60g", "60 G", "1e3", "nan", "inf", "ms", "5m"])
def test_bad_budgets_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"a share such as 0\.6"):
        Budget.parse(text)


def routing_of(*words: str):
    """What a command line asks for."""
    parser = Parser(description="", example="")
    add_routing_words(parser)
    return routing_from(parser.parse_args(words), 2, OriginalCost("carn"))


def test_words() -> None:
    plan = routing_of("--budget=60G")
    assert isinstance(plan, BudgetPlan)
    assert plan.budget == Budget(60e9, "flops")
    assert routing_of("--adaptive", "--k=0").describe() == "adaptive (ADM)"
    assert routing_of().describe() == "k = 0"
    for other in ("--k=0", "--adaptive", "--upsampler=light"):
        with pytest.raises(UserError, match="contradict"):
            routing_of("--budget=0.5", other)


class Plan(BudgetPlan):
    """A budget for these small models, whose original is CARN with 16 channels."""

    def __init__(self, text: str) -> None:
        original = make_original()
        super().__init__(Budget.parse(text), OriginalCost("carn", original))


def make_original() -> SRNetwork:
    model = models.make({"name": "carn", "args": {"nf": 16, "scale": 4}})
    assert isinstance(model, SRNetwork)
    return model


@pytest.mark.parametrize(
    ("upsamplers", "patches", "most_kept"),
    [(2, None, 10**9), (2, None, 0), (3, None, 10**9), (3, Patches(batch_size=1), 0)],
    ids=["whole", "encoded-twice", "three", "patches"],
)
def test_restored_images_meet_their_budget(upsamplers, patches, most_kept, monkeypatch) -> None:
    monkeypatch.setattr("models.inference.KEPT_FEATURES", most_kept)
    lr = torch.rand(3, 60, 32, generator=torch.Generator().manual_seed(0))
    original = make_original()
    if patches is None:
        whole = executed_flops(original, (1, 3, 60, 32))
    else:
        whole = 2 * executed_flops(original, (1, 3, 32, 32))
    model = make_model("carn", upsamplers)
    image = PcsrRestorer(model, patches=patches).image_cost((60, 32), (240, 128))
    light, heavy = (image.uniform(index) / whole for index in (0, -1))
    for position in (0.2, 0.5, 0.9):
        share = light + position * (heavy - light)
        restored = PcsrRestorer(model, Plan(f"{share}"), patches=patches)(lr, (240, 128))
        assert share * 0.995 < restored.flops_executed / whole <= share
        absolute = PcsrRestorer(model, Plan(f"{share * whole / 1e6}M"), patches=patches)
        assert absolute(lr, (240, 128)).shares == pytest.approx(restored.shares, abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spare", [-1, 0])
def test_it_is_known_before_how_often_the_encoder_runs(precision, spare, monkeypatch) -> None:
    model = make_model("carn")
    monkeypatch.setattr("models.inference.KEPT_FEATURES", model.encoder.out_dim * 60 * 32 + spare)
    lr = torch.rand(3, 60, 32, generator=torch.Generator().manual_seed(0))
    restorer = PcsrRestorer(model, AdaptiveRouting(), precision=precision)
    image = restorer.image_cost((60, 32), (240, 128))
    with torch.inference_mode():
        found = super_resolve(
            restorer.engine,
            lr[None],
            (240, 128),
            AdaptiveRouting(),
            restorer.cost.log_costs((60, 32), (240, 128)),
        )
    assert found.encoder_passes == restorer.encoder_passes((60, 32)) == (2 if spare < 0 else 1)
    assert restorer(lr, (240, 128)).flops_executed <= image.uniform(-1)


def test_too_little_names_the_least_and_the_least_is_enough() -> None:
    model, lr = make_model("carn"), torch.rand(3, 9, 7)
    for text, unit in (("0.001", ""), ("0.001M", "G")):
        with pytest.raises(UserError, match="too little") as error:
            PcsrRestorer(model, Plan(text))(lr, (36, 28))
        least = str(error.value).rsplit(" ", 1)[1]
        assert least.endswith(unit)
        assert PcsrRestorer(model, Plan(least))(lr, (36, 28)).shares == [1.0, 0.0]


def test_too_much_is_all_heavy_with_one_warning(caplog) -> None:
    restorer = PcsrRestorer(make_model("carn"), Plan("60G"))
    with caplog.at_level(logging.WARNING):
        results = [restorer(torch.rand(3, 9, 7), (36, 28)) for _ in range(2)]
    assert [restored.shares for restored in results] == [[0.0, 1.0]] * 2
    assert len(caplog.records) == 1
    assert "60G is more than the heaviest upsampler needs" in caplog.text


def test_phase_0_has_nothing_to_choose() -> None:
    parser = Parser(description="", example="")
    add_routing_words(parser)
    for words in (["--k=3"], ["--adaptive"], ["--upsampler=heavy"]):
        args = parser.parse_args(words)
        assert routing_from(args, 1, OriginalCost("carn")).describe() == "all-heavy"
    with pytest.raises(UserError, match="one upsampler, so there is nothing to choose"):
        routing_from(parser.parse_args(["--budget=0.5"]), 1, OriginalCost("carn"))


# The original


def test_the_published_original_of_each_backbone(caplog) -> None:
    for backbone in ("carn", "fsrcnn", "srresnet", "rcan"):
        config = load_config(CONFIGS / f"{backbone}-x4.yaml")
        expected = executed_flops(models.make(config.model), (1, 3, 9, 7))
        assert OriginalCost(backbone).executed((9, 7), (36, 28)) == expected
    with caplog.at_level(logging.INFO):
        nearest = OriginalCost("fsrcnn").executed((10, 10), (25, 25))
    assert nearest == OriginalCost("fsrcnn").executed((10, 10), (30, 30))
    assert (
        "no original network exists at x2.5: the budget is a share of fsrcnn at x3" in caplog.text
    )


def test_an_original_of_ones_own() -> None:
    original = OriginalCost.of_config("carn", load_config(CONFIGS / "tiny-x4.yaml"))
    assert original.executed((9, 7), (25, 25)) < OriginalCost("fsrcnn").executed((9, 7), (36, 28))


def test_originals_that_are_none() -> None:
    with pytest.raises(UserError, match="--original_config"):
        OriginalCost("mine").executed((9, 7), (36, 28))
    with pytest.raises(UserError, match="not of an original network"):
        OriginalCost.of_config("carn", load_config(CONFIGS / "tiny-pcsr-phase1.yaml"))


# Time


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


# Official weights


@pytest.mark.golden
def test_official_weights_meet_budgets(shared) -> None:
    config = load_config(CONFIGS / "carn-pcsr-phase1.yaml")
    model = load_pcsr(shared / "published/carn-pcsr-phase1.pth", torch.device("cpu"), config)
    with np.load(shared / "published/butterfly_crop.npz") as arrays:
        lr = torch.from_numpy(arrays["lr"])
    original = OriginalCost("carn")
    for size in ((192, 160), (125, 101)):
        whole = original.executed((48, 40), size)
        image = PcsrRestorer(model).image_cost((48, 40), size)
        light, heavy = (image.uniform(index) / whole for index in (0, -1))
        for position in (0.01, 0.1, 0.4, 0.8, 0.99):
            share = light + position * (heavy - light)
            restorer = PcsrRestorer(model, BudgetPlan(Budget(share, "share"), original))
            assert share * 0.995 < restorer(lr, size).flops_executed / whole <= share
