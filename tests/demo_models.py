"""Small random models for tests of demo.py, and its command line in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import models
from models.pcsr import PCSR
from utils.checkpoint import save_checkpoint

# demo.py's words to its exit code.
Demo = Callable[..., int]


def _sampler(*hidden: int) -> dict[str, Any]:
    mlp = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
    return {"name": "liif-sampler", "args": {"imnet_spec": mlp}}


ENCODER = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "no_upsampling": True}}
SPECS: dict[str, dict[str, Any]] = {
    "original": {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 4}},
    "two": {
        "name": "pcsr-phase1",
        "args": {
            "encoder_spec": ENCODER,
            "heavy_sampler_spec": _sampler(8, 8),
            "light_sampler_spec": _sampler(4),
            "classifier_spec": _sampler(),
        },
    },
    "three": {
        "name": "pcsr",
        "args": {
            "encoder_spec": ENCODER,
            "upsampler_specs": [_sampler(4), _sampler(8), _sampler(8, 8)],
            "classifier_spec": _sampler(),
        },
    },
}


def save_model(path: Path, spec: dict[str, Any], *, residual: bool = True) -> Path:
    """A checkpoint with random weights; without `residual` the model is bilinear enlargement."""
    torch.manual_seed(1)
    model = models.make(spec)
    state = model.state_dict()
    if not residual:
        assert isinstance(model, PCSR)
        for upsampler in model.upsamplers:
            last = list(upsampler.parameters())[-2:]
            for parameter in last:
                torch.nn.init.zeros_(parameter)
    save_checkpoint(path, {"model": {**spec, "sd": state}, "iter": 1})
    return path
