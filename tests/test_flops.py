"""FLOPs: the published figures in the paper's convention, and what is executed."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from models.grid import PixelGrid
from models.pcsr import PCSR
from utils.flops import PcsrCost, executed_flops, nominal_scale, paper_flops


def sampler_spec(*hidden: int) -> dict:
    mlp = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
    return {"name": "liif-sampler", "args": {"imnet_spec": mlp}}


def pcsr(
    encoder: str, width: dict, light: list[int], heavy: list[int], classifier: list[int]
) -> PCSR:
    args = {
        "encoder_spec": {"name": encoder, "args": {**width, "no_upsampling": True}},
        "heavy_sampler_spec": sampler_spec(*heavy),
        "light_sampler_spec": sampler_spec(*light),
        "classifier_spec": sampler_spec(*classifier),
    }
    model = models.make({"name": "pcsr-phase1", "args": args})
    assert isinstance(model, PCSR)
    return model


@pytest.fixture(scope="module")
def carn_pcsr() -> PCSR:
    return pcsr("carn", {"nf": 52}, light=[20] * 3, heavy=[74] * 4, classifier=[10] * 2)


@pytest.fixture(scope="module")
def fsrcnn_pcsr() -> PCSR:
    return pcsr("fsrcnn", {"d": 48}, light=[10] * 3, heavy=[58] * 4, classifier=[])


@pytest.mark.parametrize(
    ("name", "args", "paper_mflops", "executed_mflops"),
    [
        ("carn", {"nf": 64, "scale": 4}, 1156.4, 1154.9),
        ("fsrcnn", {"d": 56, "upscale": 4}, 468.0, 49.8),
    ],
)
def test_originals_on_32x32(name, args, paper_mflops, executed_mflops) -> None:
    model = models.make({"name": name, "args": args})
    assert paper_flops(model, (1, 3, 32, 32)) / 1e6 == pytest.approx(paper_mflops, abs=0.06)
    assert executed_flops(model, (1, 3, 32, 32)) / 1e6 == pytest.approx(executed_mflops, abs=0.06)


def test_relative_costs(carn_pcsr, fsrcnn_pcsr) -> None:
    for model, expected in [(carn_pcsr, (0.3188, 0.6812)), (fsrcnn_pcsr, (0.0900, 0.9100))]:
        costs = [math.exp(c) for c in PcsrCost.of(model).log_costs((32, 20), (128, 80))]
        assert costs == pytest.approx(expected, abs=5e-5)
        assert sum(costs) == pytest.approx(1)


def test_nominal_scale_is_the_mean_of_both_axes() -> None:
    assert nominal_scale((48, 40), (125, 101)) == 2.6
    assert nominal_scale((48, 40), (192, 160)) == 4


def test_all_light_is_what_the_modules_run(carn_pcsr) -> None:
    """With the classifier, against torch's counter on the modules themselves."""
    lr_size, pixels = (9, 7), 36 * 28
    grid = PixelGrid.build(lr_size, (36, 28))
    feat = torch.zeros(1, carn_pcsr.encoder.out_dim, *lr_size)
    inputs = grid.sampler_inputs(feat)
    expected = executed_flops(carn_pcsr.encoder, (1, 3, *lr_size))
    expected += executed_flops(carn_pcsr.classifier.imnet, inputs)
    expected += executed_flops(carn_pcsr.upsamplers[0].imnet, inputs)
    cost = PcsrCost.of(carn_pcsr)
    pixel_wise = cost.paper_total(lr_size, [pixels, 0]) - cost.encoder_paper(lr_size)
    assert cost.encoder_executed(lr_size) + pixel_wise == expected


@pytest.mark.parametrize("name", ["fsrcnn", "carn", "srresnet", "rcan"])
def test_backbones_have_no_uncounted_product(name: str) -> None:
    """Without batch norm and PReLU, which only the paper counts, the conventions agree."""
    encoder = models.make({"name": name, "args": {"no_upsampling": True}})
    for module in encoder.modules():
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.PReLU):
                setattr(module, child_name, nn.Identity())
    shape = (2, 3, 5, 6)
    assert paper_flops(encoder, shape) == executed_flops(encoder, shape) > 0


def test_counting_leaves_the_model_alone(carn_pcsr) -> None:
    carn_pcsr.train()
    with torch.inference_mode():
        inside = executed_flops(carn_pcsr.encoder, (1, 3, 8, 8))
    assert executed_flops(carn_pcsr.encoder, torch.zeros(1, 3, 8, 8)) == inside > 0
    assert all(p.device.type == "cpu" for p in carn_pcsr.parameters())
    assert not any(module._forward_hooks for module in carn_pcsr.modules())
    assert carn_pcsr.classifier.training


@pytest.mark.golden
def test_golden_figures(shared: Path, carn_pcsr) -> None:
    """Every figure of every image follows from its LR size and its share of heavy pixels."""
    expected = json.loads((shared / "published" / "expected.json").read_text())
    original = models.make({"name": "carn", "args": {"nf": 64, "scale": 4}})
    cost = PcsrCost.of(carn_pcsr)
    original_gflops: dict[tuple[int, int], float] = {}
    for dataset in ("Set5", "Set14", "BSD100"):
        for image in expected[dataset]["images"].values():
            h, w = size = tuple(image["lr_size_hw"])
            if size not in original_gflops:
                original_gflops[size] = paper_flops(original, (1, 3, h, w)) / 1e9
            assert original_gflops[size] == pytest.approx(image["original"][1], rel=1e-4)
            for policy in ("heavy", "k0", "k1", "adaptive", "light"):
                _, share, gflops = image[policy]
                heavy = round(share * 16 * h * w)
                counts = [16 * h * w - heavy, heavy]
                assert cost.paper_total(size, counts) / 1e9 == pytest.approx(gflops, rel=1e-4)


def test_relative_costs_are_those_of_16_pixels(carn_pcsr) -> None:
    """At x1.1 they make 18, and not 17.6."""
    cost = PcsrCost.of(carn_pcsr)
    costs = [cost.encoder_paper((16, 16)) + 18**2 * flops for flops in cost.upsampler_flops]
    expected = [math.log(each / sum(costs)) for each in costs]
    assert cost.log_costs((40, 30), (44, 33)) == pytest.approx(expected, rel=1e-12)
