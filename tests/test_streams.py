"""Streams of rows give exactly what the whole image gives."""

import pytest
import torch

import models
from models.backbones.base import SRNetwork

BACKBONES = {
    "fsrcnn": {"d": 8, "s": 4, "m": 2},
    "carn": {"nf": 8},
    "srresnet": {"nf": 8, "nb": 2},
}


def make_backbone(spec: dict) -> SRNetwork:
    """The network of `spec`, in eval mode."""
    network = models.make(spec).eval()
    assert isinstance(network, SRNetwork)
    return network


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("height", [1, 2, 3, 30])
@pytest.mark.parametrize("run", [1, 4, 29])
def test_stream_is_the_whole(backbone: str, height: int, run: int) -> None:
    torch.manual_seed(0)
    spec = {"name": backbone, "args": {**BACKBONES[backbone], "no_upsampling": True}}
    encoder = make_backbone(spec)
    x = torch.rand(2, 3, height, 7)
    with torch.inference_mode():
        expected = encoder(x)
        stream = encoder.fused().stream()
        assert stream is not None
        rows = x.permute(0, 2, 3, 1)
        starts = range(0, height, run)
        parts = [stream.push(rows[:, a : a + run], a + run >= height) for a in starts]
    out = torch.cat([part for part in parts if part.shape[1]], dim=1)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


def test_global_pooling_has_no_stream() -> None:
    spec = {"name": "rcan", "args": {"nf": 8, "ng": 1, "nb": 1, "reduction": 4}}
    assert make_backbone(spec).stream() is None
