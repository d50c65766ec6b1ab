"""Backbones by the compiled kernels: what plain torch gives, however rows come and are divided."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models import native
from models.backbones.carn import CARN
from models.backbones.fsrcnn import FSRCNN
from models.native.rows import NativeRows
from models.optimized import OptimizedOriginal
from models.row_graph import RowGraph
from tests.test_native import has_compiler, loaded

pytestmark = has_compiler


@pytest.fixture
def threads() -> Iterator[None]:
    """Numbers of threads that a test sets are set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(channels: int = 13) -> RowGraph:
    """A graph of all that the kernels can do: kernels of 1, 3 and 5, groups, sums, slopes."""
    torch.manual_seed(0)
    graph = RowGraph()
    wide = 2 * channels
    first = graph.conv([-1], nn.Conv2d(3, wide, 5, bias=False), slope=torch.rand(wide))
    second = graph.conv([first], nn.Conv2d(wide, wide, 3, groups=2), slope=0)
    third = graph.conv([second], nn.Conv2d(wide, wide, 3, groups=wide), added=first, slope=0.1)
    fourth = graph.conv([first, -1, third], nn.Conv2d(2 * wide + 3, 15, 1), slope=0)
    graph.conv([fourth, first], nn.Conv2d(15 + wide, channels, 3))
    return graph


def streamed(network: NativeRows, x: torch.Tensor, run: int) -> torch.Tensor:
    """The features from runs of rows."""
    stream, rows, height = network.stream(), x.permute(0, 2, 3, 1), x.shape[2]
    starts = range(0, height, run)
    parts = [stream.push(rows[:, a : a + run], a + run >= height) for a in starts]
    return torch.cat([part for part in parts if part.shape[1]], dim=1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("network", [CARN(nf=20, no_upsampling=True), FSRCNN(no_upsampling=True)])
def test_graph_is_the_network(network: CARN | FSRCNN) -> None:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight)
    x = torch.rand(2, 3, 9, 7)
    with torch.inference_mode():
        expected = network.eval()(x)
        torch.testing.assert_close(network.graph()(x), expected, rtol=0, atol=2e-6)
        ours = native.fused_encoder(network)
        assert isinstance(ours, NativeRows)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 7, 13, 14, 27])
@pytest.mark.parametrize("size", [(1, 1), (2, 16), (40, 17), (9, 31), (5, 33), (3, 130)])
def test_all_they_can_do(channels: int, size: tuple[int, int]) -> None:
    graph = everything(channels)
    x = torch.randn(1, 3, *size)
    ours = NativeRows(loaded(), graph)(x)
    torch.testing.assert_close(ours, graph(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(50, 70), (70, 20), (3, 100)])
@pytest.mark.usefixtures("threads")
def test_parts_and_runs_change_nothing(count: int, size: tuple[int, int]) -> None:
    """Bit for bit, with so few pixels at once that rings go round many times."""
    x = torch.randn(2, 3, *size)
    torch.set_num_threads(1)
    expected = NativeRows(loaded(), everything())(x)
    torch.set_num_threads(count)
    network = NativeRows(loaded(), everything(), chunk_px=100)
    assert torch.equal(network(x), expected)
    for run in (1, 4, 29):
        assert torch.equal(streamed(network, x, run), expected)


@pytest.mark.usefixtures("threads")
def test_images_of_a_batch_go_to_threads() -> None:
    x = torch.randn(7, 3, 12, 18)
    torch.set_num_threads(3)
    network = NativeRows(loaded(), everything())
    expected = torch.cat([network(image[None]) for image in x])
    assert torch.equal(network(x), expected)


def test_memory_is_used_again_and_nothing_of_the_image_before_is_seen() -> None:
    network = NativeRows(loaded(), everything())
    images = [torch.randn(1, 3, *size) for size in ((30, 40), (30, 40), (20, 61), (30, 40))]
    images[0] *= float("nan")
    features = [network(image) for image in images]
    assert features[0].isnan().all()
    memory = network._spare[0][1][0].data_ptr()
    assert torch.equal(network(images[3]), features[3])
    assert network._spare[0][1][0].data_ptr() == memory
    for image, found in zip(images[1:], features[1:], strict=True):
        assert torch.equal(NativeRows(loaded(), everything())(image), found)


def test_nan_is_not_hidden() -> None:
    """It reaches as far as kernels do, on the third and fourth column of 40."""
    graph = RowGraph()
    first = graph.conv([-1], nn.Conv2d(3, 5, 3), slope=0)
    graph.conv([first], nn.Conv2d(5, 5, 1), slope=0.1)
    x = torch.randn(1, 3, 8, 40)
    x[0, 1, 4, 3] = float("nan")
    found = NativeRows(loaded(), graph)(x).isnan()
    assert found[0, :, 3:6, 2:5].all() and found.sum() == 5 * 9


@pytest.mark.usefixtures("threads")
def test_threads_of_our_own_where_torch_has_none_to_lend() -> None:
    x = torch.randn(1, 3, 40, 50)
    kernels = native.compiler.load()
    expected = NativeRows(kernels, everything())(x)
    kernels._parallel = None
    torch.set_num_threads(3)
    assert torch.equal(NativeRows(kernels, everything())(x), expected)


def test_weights_are_copied() -> None:
    network = FSRCNN(no_upsampling=True).eval()
    encoder, x = native.fused_encoder(network), torch.rand(1, 3, 8, 8)
    before = encoder(x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(encoder(x), before)


def test_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def double(self: NativeRows, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.graph(x)

    monkeypatch.setattr(NativeRows, "__call__", double)
    with caplog.at_level(logging.WARNING):
        encoder = native.fused_encoder(CARN(nf=8, no_upsampling=True).eval())
    assert not isinstance(encoder, NativeRows)
    assert "their features are wrong; plain torch" in caplog.text


def test_originals_are_compared_with_the_same_kernels() -> None:
    assert isinstance(OptimizedOriginal(CARN(nf=8).eval()).features, NativeRows)
