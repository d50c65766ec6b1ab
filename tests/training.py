"""Small training runs for tests: pictures, configs, and what a run left."""

import copy
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.start import TrainOptions
from engine.trainer import Trainer, train
from utils.checkpoint import LAST_NAME, load_checkpoint, save_checkpoint
from utils.config import Config, check_config
from utils.distributed import World

KINDS = ("fsrcnn", "carn", "fsrcnn-phase0", "carn-phase0", "fsrcnn-phase1", "carn-phase1")
# With the widths of the published models, so that the same kernels run as in earnest.
ARGS: dict[str, dict[str, Any]] = {
    "fsrcnn": {"d": 56},
    "carn": {"nf": 64},
    "fsrcnn-pcsr": {"d": 48},
    "carn-pcsr": {"nf": 52},
}
HIDDEN = {"fsrcnn": ([58] * 4, [10] * 3, []), "carn": ([74] * 4, [20] * 3, [10, 10])}
# Everything of a training step that is off by default.
KEYS = {
    "ema": 0.9,
    "grad_clip": 0.3,
    "warmup": 3,
    "accumulate": 2,
    "nan_skip": 1,
    "psnr_from": 1,
    "l2_from": 2,
    "revive": [0, 2],
}
ONE = World(0, 1, torch.device("cpu"))


# Eigenvectors change within the few iterations that tests have.
SOAP = {"name": "soap", "args": {"lr": 3e-3, "precondition_frequency": 2}}


def make_pictures(folder: Path, count: int = 5, side: int = 48) -> Path:
    """Write `count` PNG files of smooth noise, the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = generator.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index}.png")
    return folder


def liif(hidden: list[int]) -> dict[str, Any]:
    """Spec of a sampler."""
    imnet = {"name": "mlp", "args": {"hidden_list": hidden}}
    return {"name": "liif-sampler", "args": {"imnet_spec": imnet}}


def model_spec(kind: str) -> dict[str, Any]:
    """Model spec of one of KINDS."""
    backbone, _, phase = kind.partition("-")
    if not phase:
        return {"name": backbone, "args": ARGS[backbone]}
    encoder = {"name": backbone, "args": {**ARGS[f"{backbone}-pcsr"], "no_upsampling": True}}
    heavy, light, classifier = HIDDEN[backbone]
    args = {"encoder_spec": encoder, "heavy_sampler_spec": liif(heavy)}
    if phase == "phase1":
        args |= {"light_sampler_spec": liif(light), "classifier_spec": liif(classifier)}
    return {"name": f"pcsr-{phase}", "args": args}


def raw_config(kind: str, pictures: Path, **changes: Any) -> dict[str, Any]:
    """A config of one of KINDS; `changes` replace top-level keys."""
    phase = {"phase0": 0, "phase1": 1}.get(kind.partition("-")[2])
    data = {
        "dataset": {
            "name": "image-folder",
            "args": {"root_path": str(pictures), "cache": "in_memory"},
        },
        "wrapper": {
            "name": "sr-implicit-downsampled",
            "args": {"inp_size": 8, "scale": [4, 4], "augment": True},
        },
        "batch_size": 4,
    }
    raw = {
        "phase": phase,
        "seed": 0,
        "train_dataset": data,
        "model": model_spec(kind),
        "optimizer": {"name": "adam", "args": {"lr": 1e-3, "betas": [0.9, 0.99]}},
        "lr_scheduler": {
            "name": "CosineAnnealingLR_Restart",
            "args": {"T_period": [100], "eta_min": 1e-7},
        },
        "iter_max": 6,
        "iter_print": 2,
        "iter_save": 100,
    }
    return copy.deepcopy({**raw, **changes})


def make_config(kind: str, pictures: Path, **changes: Any) -> Config:
    """:func:`raw_config`, checked, with the name of `kind`."""
    return check_config(raw_config(kind, pictures, **changes), kind)


def run(config: Config, save_dir: Path, world: World = ONE, **options: Any) -> int:
    """Train in this process. Returns the exit code."""
    return train(config, TrainOptions(save_dir=save_dir, **options), world)


def with_dead_units(source: Path, target: Path, layer: str = "b1.b1.body.0") -> None:
    """The weights of a checkpoint, the first two units of a layer dead."""
    checkpoint = load_checkpoint(source)
    checkpoint["model"]["sd"][f"{layer}.bias"][:2] = -1e3
    save_checkpoint(target, {"model": checkpoint["model"], "iter": 0})


def checkpoint_of(save_dir: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return load_checkpoint(save_dir / LAST_NAME)


def metrics_of(save_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    lines = (save_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    return [] if a == b else [where]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send the process a signal in the middle of an iteration."""
    iterate = Trainer._iterate

    def iterate_and_signal(self: Trainer, current: int, batch: Any) -> Any:
        if current == step:
            signal.raise_signal(number)
        return iterate(self, current, batch)

    monkeypatch.setattr(Trainer, "_iterate", iterate_and_signal)
