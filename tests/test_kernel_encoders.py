"""Backbones and refinement by Triton's kernels give what plain torch gives."""

from typing import Any

import pytest
import torch

import models
from models import kernels
from models.backbones.base import SRNetwork
from models.row_graph import RowGraph, sequential_graph
from tests.triton_device import (
    DEVICE,
    LIGHT_AND_HEAVY,
    halves,
    make_model,
    on_device,
    skip_bf16_in_the_interpreter,
)

pytestmark = pytest.mark.usefixtures("exact_convolutions")


def encoder_of(graph: RowGraph, dtype: torch.dtype = torch.float32) -> Any:
    """Triton must not be imported before it is known that it is there."""
    from models.kernels.encoder import GraphEncoder

    return GraphEncoder(graph, dtype)


BACKBONES = {
    "fsrcnn": {"d": 20, "s": 6, "m": 2},
    "carn": {"nf": 24},
    "srresnet": {"nf": 16, "nb": 2},
}


def make_backbone(name: str) -> SRNetwork:
    """A small backbone on the device, its batch norm not trivial."""
    torch.manual_seed(0)
    network = models.make({"name": name, "args": {**BACKBONES[name], "no_upsampling": True}})
    assert isinstance(network, SRNetwork)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.eval().to(DEVICE)


@on_device
@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("lr_size", [(7, 19), (1, 1), (1, 5), (6, 1)])
def test_backbones(name: str, lr_size: tuple[int, int]) -> None:
    from models.kernels.encoder import GraphEncoder

    network = make_backbone(name)
    x = torch.rand(2, 3, *lr_size, device=DEVICE)
    graph = network.graph()
    assert graph is not None
    with torch.inference_mode():
        expected = network(x)
        features = GraphEncoder(graph)(x)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert (features - expected).norm() < 2e-6 * expected.norm()


@on_device
@halves
@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_in_half_precision(name: str, dtype: torch.dtype) -> None:
    from models.kernels.encoder import GraphEncoder

    skip_bf16_in_the_interpreter(dtype)
    network = make_backbone(name)
    x = torch.rand(1, 3, 7, 19, device=DEVICE)
    graph = network.graph()
    assert graph is not None
    with torch.inference_mode():
        expected = network(x)
        features = GraphEncoder(graph, dtype)(x)
    assert features.dtype == dtype
    assert 0 < (features.float() - expected).norm() < 0.02 * expected.norm()


@on_device
@pytest.mark.parametrize("runs", [(40,), (1, 39), (13, 9, 18), (5,) * 8])
def test_backbones_take_rows_as_they_come(runs: tuple[int, ...]) -> None:
    from models.kernels.encoder import GraphEncoder

    graph = make_backbone("fsrcnn").graph()
    assert graph is not None
    encoder = GraphEncoder(graph)
    x = torch.rand(1, 3, 40, 6, device=DEVICE)
    with torch.inference_mode():
        stream = encoder.stream()
        assert stream is not None
        found = []
        for index, rows in enumerate(x.permute(0, 2, 3, 1).split(runs, dim=1)):
            found.append(stream.push(rows.contiguous(), last=index == len(runs) - 1))
        whole = torch.cat([rows for rows in found if rows.shape[1]], dim=1).permute(0, 3, 1, 2)
        torch.testing.assert_close(whole, encoder(x), rtol=0, atol=1e-6)


@on_device
def test_the_engine_runs_backbones_by_kernels() -> None:
    from models.fused import FusedEngine
    from models.kernels.encoder import GraphEncoder

    assert isinstance(FusedEngine(make_model(*LIGHT_AND_HEAVY)).encoder, GraphEncoder)


@on_device
def test_wrong_backbones_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from models.kernels import encoder

    apply_sum = encoder.apply_sum

    def apply_wrongly(packed: Any, sources: Any, *args: Any) -> None:
        apply_sum(packed, [source.flip(-2) for source in sources], *args)

    monkeypatch.setattr(encoder, "apply_sum", apply_wrongly)
    network = make_backbone("fsrcnn")
    found = kernels.fused_encoder(network)
    assert not isinstance(found, encoder.GraphEncoder)
    assert "their features are wrong" in caplog.text


@on_device
def test_backbones_that_do_not_compile_are_run_by_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from models.kernels import encoder

    def fail(*_: Any) -> None:
        raise Exception("out of resource: shared memory\nmore")

    monkeypatch.setattr(encoder, "apply_sum", fail)
    found = kernels.fused_encoder(make_backbone("fsrcnn"))
    assert not isinstance(found, encoder.GraphEncoder)
    assert "plain torch is used: out of resource: shared memory\n" in caplog.text


@on_device
def test_features_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from models.kernels import encoder

    apply_sum = encoder.apply_sum

    def apply_with_nan(packed: Any, sources: Any, out: torch.Tensor, *args: Any) -> None:
        apply_sum(packed, sources, out, *args)
        out.view(-1)[0] = float("nan")

    monkeypatch.setattr(encoder, "apply_sum", apply_with_nan)
    found = kernels.fused_encoder(make_backbone("fsrcnn"), torch.float16)
    assert not isinstance(found, encoder.GraphEncoder)


@on_device
def test_wide_backbones() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 70, 3, padding=1).to(DEVICE)
    body = torch.nn.Conv2d(70, 130, 3, padding=1).to(DEVICE)
    graph = sequential_graph([conv, torch.nn.ReLU(), body])
    x = torch.rand(1, 3, 5, 6, device=DEVICE)
    with torch.inference_mode():
        expected = graph(x)
        for dtype, limit in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
            features = encoder_of(graph, dtype)(x).float()
            assert (features - expected).norm() < limit * expected.norm()


@on_device
def test_numbers_that_float16_does_not_hold_stay_finite() -> None:
    from models.kernels.conv import split

    high, low = split(torch.tensor([7e4, -1e6, 65504.0]))
    assert high.isfinite().all() and low.isfinite().all()
    conv = torch.nn.Conv2d(3, 16, 1).to(DEVICE)
    with torch.no_grad():
        conv.weight.fill_(1e5 / 3)
        last = torch.nn.Conv2d(16, 4, 1).to(DEVICE)
        found = encoder_of(sequential_graph([conv, last]))(torch.ones(1, 3, 2, 2).to(DEVICE))
    assert found.isfinite().all()


@on_device
def test_split_numbers_are_as_exact_as_float32() -> None:
    from models.kernels.conv import split

    x = torch.randn(1000) * torch.logspace(-3, 4, 1000)
    high, low = split(x).double()
    assert ((high + low / 2048 - x).abs() <= 2**-21 * x.abs() + 2**-35).all()


@on_device
@pytest.mark.parametrize("size", [(40, 31), (3, 3), (2, 9), (5, 2), (1, 1)])
@pytest.mark.parametrize("first", [0, 1])
def test_refinement(size: tuple[int, int], first: int) -> None:
    from models.kernels.refine import refine_rows
    from models.refinement import _plainly_refined

    torch.manual_seed(0)
    prediction = torch.rand(2, 3, *size, device=DEVICE)
    classes = torch.randint(3, (2, *size), device=DEVICE, dtype=torch.uint8)
    rows = max(0, size[0] - first)
    whole = torch.full((2, 3, rows + 2, size[1]), float("nan"), device=DEVICE)
    refine_rows(prediction, classes, first, whole[:, :, 1 : rows + 1])
    expected = _plainly_refined(prediction, classes)[:, :, first:]
    torch.testing.assert_close(whole[:, :, 1 : rows + 1], expected, rtol=0, atol=1e-6)
    assert whole[:, :, [0, -1]].isnan().all()
