"""Where the tests of Triton's kernels run: on a GPU where there is one, else in its interpreter.

The interpreter has to be chosen before Triton is first imported, so without a GPU
`test_in_the_interpreter` runs these tests in processes of their own.
"""

import importlib.util
import os

import pytest
import torch

import models
from models.grid import PixelGrid
from models.pcsr import PCSR
from tests.training import liif

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
LIGHT_AND_HEAVY = ((5,), (21, 20, 19))

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
on_device = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or DEVICE.type == "cuda")),
    reason="no GPU: test_in_the_interpreter runs this",
)
compiled = pytest.mark.skipif(INTERPRETED, reason="about the compiler, not the interpreter")
without_gpu = pytest.mark.skipif(
    INTERPRETED or DEVICE.type == "cuda", reason="the kernels run on the GPU itself"
)
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def skip_bf16_in_the_interpreter(dtype: torch.dtype) -> None:
    """Skip where `dtype` cannot be tested."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes the bits of bf16 for integers in products")


def make_model(*upsamplers: tuple[int, ...], classifier: tuple[int, ...] = (10,)) -> PCSR:
    """A small model on the device, with a std and with a classifier that is undecided."""
    torch.manual_seed(0)
    spec = {
        "encoder_spec": {"name": "fsrcnn", "args": {"d": 12, "m": 1, "no_upsampling": True}},
        "upsampler_specs": [liif(list(hidden)) for hidden in upsamplers],
        "data_norm": {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.25, 2.0]},
    }
    if len(upsamplers) > 1:
        spec["classifier_spec"] = liif(list(classifier))
    model = models.make({"name": "pcsr", "args": spec}).eval()
    assert isinstance(model, PCSR)
    if model.classifier is not None:
        last = model.classifier.imnet.linears[-1]
        with torch.no_grad():
            last.weight.mul_(20)
            logits = model.classifier(
                model.encode(torch.rand(1, 3, 9, 7)), PixelGrid.build((9, 7), (36, 28))
            )
            last.bias.sub_(logits.mean(dim=(0, 1)))
    return model.to(DEVICE)
