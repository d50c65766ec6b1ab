"""The official weights give the official figures and pictures, to the published tolerances.

By default all of Set5, every 5th image of Set14 and every 10th of BSD100 are run; with
PCSR_GOLDEN=all all of them, which takes a few minutes on one core.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.conventions import Conventions
from engine.evaluation import bicubic
from engine.loading import load_original, load_pcsr
from engine.restore import OriginalRestorer, PcsrRestorer, Restored
from engine.samples import EvaluationSample, EvaluationSet, ImagePaths
from models.grid import PixelGrid
from models.pcsr import PCSR
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from utils.config import load_config
from utils.metrics import psnr

pytestmark = pytest.mark.golden

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = torch.device("cpu")
CONVENTIONS = Conventions(scale=4.0, psnr_type="rgb", lr="bicubic float", crop=True, per_image=True)
IMAGES = {"Set5": 5, "Set14": 14, "BSD100": 100}
EVERY = {"Set5": 1, "Set14": 5, "BSD100": 10}
ROUTINGS: dict[str, Routing] = {
    "heavy": KRouting(-25.0),
    "k0": KRouting(0.0),
    "k1": KRouting(1.0),
    "adaptive": AdaptiveRouting(),
    "light": KRouting(25.0),
}
BUTTERFLY_ROUTINGS: dict[str, Routing] = {
    **ROUTINGS,
    "heavy": FixedRouting(-1),
    "light": FixedRouting(0),
}


@pytest.fixture(scope="module")
def original(shared) -> OriginalRestorer:
    config = load_config(CONFIGS / "carn-x4.yaml")
    return OriginalRestorer(load_original(shared / "published/carn-x4.pth", CPU, config))


@pytest.fixture(scope="module")
def pcsr(shared) -> PCSR:
    config = load_config(CONFIGS / "carn-pcsr-phase1.yaml")
    return load_pcsr(shared / "published/carn-pcsr-phase1.pth", CPU, config)


@pytest.fixture(scope="module")
def expected(shared) -> dict[str, Any]:
    return json.loads((shared / "published/expected.json").read_text())


@pytest.fixture(scope="module")
def butterfly(shared) -> dict[str, np.ndarray]:
    with np.load(shared / "published/butterfly_crop.npz") as arrays:
        return dict(arrays)


def sample_of(shared: Path, name: str, index: int) -> EvaluationSample:
    paths = ImagePaths.of_folders(shared / "data/test" / name / "HR")
    assert len(paths.hr) == IMAGES[name]
    return EvaluationSet(ImagePaths(paths.hr[index : index + 1]), CONVENTIONS)[0]


def assert_published(restored: Restored, sample: EvaluationSample, published: list[float]) -> None:
    """`published`: PSNR in dB, share of heavy pixels where there is one, GFLOPs (paper)."""
    quality = psnr(restored.sr, sample.hr, psnr_type="rgb", border_px=4)
    assert quality == pytest.approx(published[0], abs=0.005)
    assert restored.flops_paper / 1e9 == pytest.approx(published[-1], rel=0.001)
    if restored.shares:
        assert restored.shares[-1] == pytest.approx(published[1], abs=1e-4)


def chosen_images() -> list[tuple[str, int]]:
    step = dict.fromkeys(EVERY, 1) if os.environ.get("PCSR_GOLDEN") == "all" else EVERY
    return [(name, index) for name in IMAGES for index in range(0, IMAGES[name], step[name])]


@pytest.mark.parametrize(("name", "index"), chosen_images())
def test_benchmark_image(name, index, shared, original, pcsr, expected) -> None:
    sample = sample_of(shared, name, index)
    published = expected[name]["images"][sample.name]
    assert list(sample.lr.shape[1:]) == published["lr_size_hw"]
    assert_published(original(sample.lr), sample, published["original"])
    for key, routing in ROUTINGS.items():
        restored = PcsrRestorer(pcsr, routing)(sample.lr, sample.size)
        assert_published(restored, sample, published[key])


@pytest.mark.parametrize("key", ["k0", "adaptive"])
def test_bf16_on_set5(key, shared, pcsr) -> None:
    routing = ROUTINGS[key]
    losses = []
    for index in range(IMAGES["Set5"]):
        sample = sample_of(shared, "Set5", index)
        exact, rounded = (
            PcsrRestorer(pcsr, routing, precision=word)(sample.lr, sample.size).sr
            for word in ("fp32", "bf16")
        )
        qualities = [psnr(sr, sample.hr, psnr_type="rgb", border_px=4) for sr in (exact, rounded)]
        losses.append(qualities[0] - qualities[1])
    assert np.mean(losses) <= 0.01


def test_bicubic_on_set5(shared) -> None:
    qualities = []
    for index in range(IMAGES["Set5"]):
        sample = sample_of(shared, "Set5", index)
        sr = bicubic(sample.lr, sample.size).sr
        qualities.append(psnr(sr, sample.hr, psnr_type="rgb", border_px=4))
    assert np.mean(qualities) == pytest.approx(26.30, abs=0.005)


def test_butterfly_original(original, butterfly) -> None:
    restored = original(torch.from_numpy(butterfly["lr"]))
    assert_close(restored.sr, butterfly["original"])


def test_butterfly_encoder_and_margin(pcsr, butterfly) -> None:
    lr = torch.from_numpy(butterfly["lr"])[None]
    with torch.inference_mode():
        feat = pcsr.encode(lr)
        logits = pcsr.classifier.dense(feat, PixelGrid.build((48, 40), (192, 160), CPU))[0]
    assert_close(feat[0, :, :4, :4], butterfly["encoder_feature_corner"])
    assert feat.abs().mean().item() == pytest.approx(butterfly["encoder_feature_mean_abs"].item())
    assert_close(logits[1] - logits[0], butterfly["margin_heavy_minus_light"])


@pytest.mark.parametrize("refinement", [True, False], ids=["refined", "not-refined"])
@pytest.mark.parametrize("key", BUTTERFLY_ROUTINGS)
def test_butterfly_routed(key, refinement, pcsr, butterfly) -> None:
    restorer = PcsrRestorer(pcsr, BUTTERFLY_ROUTINGS[key], refinement=refinement)
    restored = restorer(torch.from_numpy(butterfly["lr"]), (192, 160))
    assert restored.classes is not None
    agree = restored.classes.numpy() == butterfly[f"{key}_class"]
    assert agree.mean() >= 0.9999
    name = f"{key}_no_refinement"
    if refinement and key in butterfly:
        name = key
    # A pixel's refinement looks at its 3x3 neighbours.
    differs = torch.from_numpy(~agree).float()[None, None]
    same = F.max_pool2d(differs, 3, stride=1, padding=1)[0, 0].numpy() == 0
    assert_close(restored.sr[:, same], butterfly[name][:, same])


@pytest.mark.parametrize("size", [(144, 120), (125, 101)], ids=["144x120", "125x101"])
def test_butterfly_at_other_sizes(size, pcsr, butterfly) -> None:
    restored = PcsrRestorer(pcsr, FixedRouting(-1))(torch.from_numpy(butterfly["lr"]), size)
    assert_close(restored.sr, butterfly[f"heavy_{size[0]}x{size[1]}"])


def assert_close(ours: Tensor, published: np.ndarray) -> None:
    assert tuple(ours.shape) == published.shape
    assert np.abs(ours.numpy() - published).max() <= 2e-4
