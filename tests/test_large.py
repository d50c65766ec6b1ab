"""Original networks on large images (models.large)."""

import copy
from typing import Any

import pytest
import torch

import models
from models.backbones.base import SRNetwork
from models.large import LargeOriginal
from utils.flops import executed_flops

NETWORKS: dict[str, dict[str, Any]] = {
    "fsrcnn": {"d": 8, "s": 4, "m": 1},
    "carn": {"nf": 8},
    "srresnet": {"nf": 8, "nb": 2},
    "rcan": {"nf": 8, "ng": 1, "nb": 2, "reduction": 4},
}
LR_SIZE = (53, 7)


def make(name: str, scale: int) -> SRNetwork:
    torch.manual_seed(scale)
    key = "scale" if name in ("carn", "rcan") else "upscale"
    network = models.make({"name": name, "args": {**NETWORKS[name], key: scale}})
    assert isinstance(network, SRNetwork)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_strips_make_the_whole_image(name: str, scale: int) -> None:
    network = make(name, scale)
    lr = torch.rand(1, 3, *LR_SIZE)
    whole = network(lr)
    scale_of_values = whole.abs().max()
    for rows in (1, 6, 20):
        sr = LargeOriginal(network, whole_px=rows * LR_SIZE[1])(lr)
        torch.testing.assert_close(sr / scale_of_values, whole / scale_of_values)
    assert torch.equal(LargeOriginal(network)(lr), whole)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_overlaps_is_counted(name: str) -> None:
    network = make(name, 4)
    whole = executed_flops(network, (1, 3, *LR_SIZE))
    assert LargeOriginal(network).flops(LR_SIZE) == whole
    features = copy.deepcopy(network)
    features.no_upsampling = True
    tail = whole - executed_flops(features, (1, 3, *LR_SIZE))
    # Three strips, each of 4 rows more on the sides where there are others.
    found = LargeOriginal(network, whole_px=20 * LR_SIZE[1]).flops(LR_SIZE)
    assert found - whole == pytest.approx(tail * 16 / LR_SIZE[0], rel=1e-9)
