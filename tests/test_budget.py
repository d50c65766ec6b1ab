"""Budgets: how exactly engines meet them, how they are given, and what is refused."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from engine.budget import Budget, BudgetPlan, OriginalCost
from engine.inference_words import add_routing_words, routing_from
from engine.loading import load_pcsr
from engine.restore import Patches, PcsrRestorer
from models.budget import BudgetRouting
from models.cost import count_rows
from models.fast import FastEngine
from models.grid import PixelGrid
from models.inference import Engine, super_resolve
from models.patches import super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import AdaptiveRouting
from tests.budgets import SHARES, Plan, between, make_original
from tests.test_fast import make_model, mlp
from utils.cli import Parser
from utils.config import load_config
from utils.errors import UserError
from utils.flops import PcsrCost, executed_flops

CONFIGS = Path(__file__).parent.parent / "configs"


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


@pytest.mark.parametrize("amount", [1.001e-5, 0.6, 12.345, 1.23e13, 7e15])
@pytest.mark.parametrize("unit", ["share", "flops", "seconds"])
def test_amounts_are_told_as_they_are_typed(amount, unit) -> None:
    budget = Budget(amount, unit)
    again = Budget.parse(budget.exactly())
    assert (again.amount, again.unit) == (pytest.approx(amount), unit)
    rounded = Budget.parse(budget.format(amount))
    assert amount <= rounded.amount * (1 + 1e-9) <= amount * 1.002


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


def test_a_heaviest_upsampler_that_executes_less_than_the_lightest(caplog) -> None:
    # A wide first layer runs once for each LR pixel: dear by the published count, not when run.
    torch.manual_seed(0)
    encoder = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "no_upsampling": True}}
    specs = [mlp(20, 20, 20), mlp(100)]
    args = {"encoder_spec": encoder, "upsampler_specs": specs, "classifier_spec": mlp(4)}
    model, lr, size = models.make({"name": "pcsr", "args": args}), torch.rand(3, 9, 7), (36, 28)
    assert isinstance(model, PCSR)
    model.eval()
    image = PcsrRestorer(model, AdaptiveRouting()).image_cost((9, 7), size)
    light, heavy = image.uniform(0), image.uniform(-1)
    assert heavy < 0.9 * light
    for amount in (heavy, (heavy + light) / 2, 1.1 * light):
        restored = PcsrRestorer(model, Plan(f"{amount / 1e6}M"))(lr, size)
        assert restored.shares == [0.0, 1.0]
        assert restored.flops_executed == heavy
    with pytest.raises(UserError, match="with the heaviest upsampler everywhere this image takes"):
        PcsrRestorer(model, Plan(f"{0.9 * heavy / 1e6}M"))(lr, size)


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
