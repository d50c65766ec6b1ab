"""Every config in the repository: it parses, builds, and has the size it is known for."""

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.data import make_samples
from engine.optim import OPTIMIZERS, SCHEDULERS
from utils.config import Config, load_config
from utils.flops import PcsrCost, paper_flops

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BACKBONES = ("fsrcnn", "carn", "srresnet", "rcan")
PATHS = sorted(CONFIGS.rglob("*.yaml"))
PHASE1 = [path for path in PATHS if path.stem.endswith("-phase1")]
# Exactly; what is published of them is 25K, 294.92K, 168.97K, 1.5M, 1.1M and 15.6M.
PARAMETERS = {
    "fsrcnn-x4": 24_515,
    "fsrcnn-pcsr-phase1": 24_502,
    "carn-x4": 294_915,
    "carn-pcsr-phase1": 168_970,
    "srresnet-x4": 1_517_571,
    "srresnet-pcsr-phase1": 1_078_390,
    "rcan-x4": 15_592_355,
    "rcan-pcsr-phase1": 6_588_696,
}


def name_of(path: Path) -> str:
    """How a test calls a config."""
    return str(path.relative_to(CONFIGS).with_suffix(""))


def make_model(config: Config) -> Any:
    """The model that a config describes."""
    return models.make(config.model, data_norm=config.data_norm)


@pytest.fixture(params=PATHS, ids=name_of)
def config(request: pytest.FixtureRequest) -> Config:
    """Each config in turn."""
    return load_config(request.param)


def test_every_published_config_is_here() -> None:
    kinds = ("x4", "pcsr-phase0", "pcsr-phase1")
    wanted = {f"{name}-{kind}" for name in (*BACKBONES, "tiny") for kind in kinds}
    assert wanted <= {name_of(path) for path in PATHS}


def test_model_builds_and_takes_an_odd_size(config: Config) -> None:
    model = make_model(config).eval()
    lr = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        sr = model(lr) if config.phase is None else model(lr, (36, 28))
    assert sr.shape == (1, 3, 36, 28)


def test_optimizer_and_scheduler_build(config: Config) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    assert config.optimizer is not None and config.lr_scheduler is not None
    optimizer = OPTIMIZERS.make(config.optimizer, "optimizer", params=[weight])
    SCHEDULERS.make(config.lr_scheduler, "lr_scheduler", optimizer=optimizer)


def test_the_schedule_ends_with_the_training(config: Config) -> None:
    assert config.lr_scheduler is not None
    assert sum(config.lr_scheduler["args"]["T_period"]) == config.iter_max


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    model = make_model(load_config(CONFIGS / f"{name}.yaml"))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("path", PHASE1, ids=name_of)
def test_phase1_continues_phase0(path: Path) -> None:
    phase1 = load_config(path)
    phase0 = load_config(path.with_name(path.name.replace("phase1", "phase0")))
    assert (phase0.phase, phase1.phase) == (0, 1)
    for key, value in phase0.model["args"].items():
        assert phase1.model["args"][key] == value, key
    for key in ("data_norm", "psnr_type", "patch_size", "step", "valid_dataset"):
        assert getattr(phase0, key) == getattr(phase1, key), key


def test_rcan_pcsr_takes_about_half_of_rcan() -> None:
    rcan = make_model(load_config(CONFIGS / "rcan-x4.yaml"))
    cost = PcsrCost.of(make_model(load_config(CONFIGS / "rcan-pcsr-phase1.yaml")))
    original = paper_flops(rcan, (1, 3, 32, 32))
    half_heavy = cost.paper_total((32, 32), [128 * 64, 128 * 64])
    assert 0.45 < half_heavy / original < 0.55


@pytest.mark.parametrize("kind", ["x4", "pcsr-phase0", "pcsr-phase1"])
def test_tiny_configs_find_their_pictures(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load_config(CONFIGS / f"tiny-{kind}.yaml")
    assert config.seed == 0
    assert config.iter_save_s is not None and config.iter_save_s <= 5
    assert config.train_dataset is not None and config.valid_dataset is not None
    train = make_samples(config.train_dataset, "train_dataset")
    assert train[0]["lr"].shape == (3, 32, 32)
    assert train[0]["hr"].shape == (3, 128, 128)
    valid = make_samples(config.valid_dataset, "valid_dataset")
    assert valid[1]["lr"].shape == (3, 64, 64)
