"""Backbones by the compiled kernels: what plain torch gives, however rows come and are divided."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models import native
from models.backbones.carn import CARN
from models.backbones.fsrcnn import FSRCNN
from models.backbones.srresnet import SRResNet
from models.native.half_plan import half_plan
from models.native.rows import NativeRows
from models.optimized import OptimizedOriginal
from models.row_graph import RowGraph, sequential_graph
from tests.test_native import has_compiler, loaded

pytestmark = has_compiler
DTYPES = [torch.float32, torch.bfloat16]


def rows_of(graph: RowGraph, dtype: torch.dtype = torch.float32, **words: int) -> NativeRows:
    """The kernels for a graph; the test is skipped where the processor has no matrix unit."""
    if dtype == torch.bfloat16 and not loaded().has_half:
        pytest.skip("needs a processor with AMX")
    return NativeRows(loaded(), graph, dtype, **words)


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


NETWORKS = [
    CARN(nf=20, no_upsampling=True),
    FSRCNN(no_upsampling=True),
    SRResNet(nf=8, nb=2, no_upsampling=True),
]


def test_graph_of_a_plain_sequence() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(5, 6, 1), nn.PReLU(6, init=0.2), nn.Conv2d(6, 4, 3, padding=1))
    layers = [nn.Conv2d(3, 5, 3, padding=1), nn.LeakyReLU(0.1), inner, nn.ReLU()]
    x = torch.rand(2, 3, 6, 5)
    expected = nn.Sequential(*layers)(x)
    torch.testing.assert_close(sequential_graph(layers)(x), expected, rtol=0, atol=1e-6)
    for others in ([nn.ReLU()], [*layers, nn.ReLU()], [layers[0], nn.BatchNorm2d(5)]):
        with pytest.raises(TypeError, match="each with one activation or none"):
            sequential_graph(others)


@pytest.mark.parametrize("network", NETWORKS)
def test_graph_is_the_network(network: CARN | FSRCNN | SRResNet) -> None:
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


def check_close(network: NativeRows, graph: RowGraph, x: torch.Tensor, tolerance: float) -> None:
    """The norm of the difference, relative to that of the output."""
    expected = graph(x)
    assert (network(x) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 13, 14, 27])
@pytest.mark.parametrize(
    "size", [(1, 1), (2, 16), (40, 17), (9, 31), (5, 33), (3, 130), (200, 3), (60, 13)]
)
def test_all_they_can_do(channels: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    graph = everything(channels)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    check_close(rows_of(graph, dtype), graph, torch.randn(1, 3, *size), tolerance)


def test_half_precision_of_backbones() -> None:
    """CARN's groups of 13 are filled up to 16; SRResNet has none."""
    networks = CARN(nf=52, no_upsampling=True), SRResNet(nf=58, nb=3, no_upsampling=True)
    for network in networks:
        graph = network.eval().graph()
        for size in ((30, 40), (60, 15)):
            x = torch.randn(1, 3, *size)
            check_close(rows_of(graph, torch.bfloat16), graph, x, 1e-2)
        assert isinstance(native.fused_encoder(network, torch.bfloat16), NativeRows)
    assert isinstance(native.fused_encoder(networks[0]), NativeRows)
    assert not isinstance(native.fused_encoder(networks[1]), NativeRows), "torch is faster"


def test_other_libraries_go_on_using_the_matrix_unit() -> None:
    """torch's products in half precision, on the same threads, before and afterwards."""
    network = rows_of(everything(), torch.bfloat16)
    a, b = torch.randn(300, 200).bfloat16(), torch.randn(200, 100).bfloat16()
    x, before = torch.randn(1, 3, 20, 30), a @ b
    features = network(x)
    for _ in range(3):
        assert torch.equal(a @ b, before)
        assert torch.equal(network(x), features)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(50, 70), (70, 20), (3, 100)])
@pytest.mark.usefixtures("threads")
def test_parts_and_runs_change_nothing(
    count: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit, with so few pixels at once that rings go round many times."""
    x = torch.randn(2, 3, *size)
    torch.set_num_threads(1)
    expected = rows_of(everything(), dtype)(x)
    torch.set_num_threads(count)
    network = rows_of(everything(), dtype, chunk_px=100)
    assert torch.equal(network(x), expected)
    for run in (1, 4, 29):
        assert torch.equal(streamed(network, x, run), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_images_of_a_batch_go_to_threads(dtype: torch.dtype) -> None:
    x = torch.randn(7, 3, 12, 18)
    torch.set_num_threads(3)
    network = rows_of(everything(), dtype)
    expected = torch.cat([network(image[None]) for image in x])
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_used_again_and_nothing_of_the_image_before_is_seen(dtype: torch.dtype) -> None:
    network = rows_of(everything(), dtype)
    images = [torch.randn(1, 3, *size) for size in ((30, 40), (30, 40), (20, 61), (30, 40))]
    images[0] *= float("nan")
    features = [network(image) for image in images]
    assert features[0].isnan().all()
    memory = network._spare[0][1][0].data_ptr()
    assert torch.equal(network(images[3]), features[3])
    assert network._spare[0][1][0].data_ptr() == memory
    for image, found in zip(images[1:], features[1:], strict=True):
        assert torch.equal(rows_of(everything(), dtype)(image), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    """It reaches as far as kernels do, on the third and fourth column of 40."""
    graph = RowGraph()
    first = graph.conv([-1], nn.Conv2d(3, 5, 3), slope=0)
    graph.conv([first], nn.Conv2d(5, 5, 1), slope=0.1)
    x = torch.randn(1, 3, 8, 40)
    x[0, 1, 4, 3] = float("nan")
    found = rows_of(graph, dtype)(x).isnan()
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
    right = NativeRows.__call__

    def double(self: NativeRows, x: torch.Tensor) -> torch.Tensor:
        return 2 * right(self, x)

    monkeypatch.setattr(NativeRows, "__call__", double)
    with caplog.at_level(logging.WARNING):
        encoder = native.fused_encoder(CARN(nf=8, no_upsampling=True).eval())
    assert not isinstance(encoder, NativeRows)
    assert "their features are wrong; plain torch" in caplog.text


def test_originals_are_compared_with_the_same_kernels() -> None:
    model, lr = CARN(nf=8).eval(), torch.rand(1, 3, 9, 7)
    network = OptimizedOriginal(model)
    assert isinstance(network.features, NativeRows)
    torch.testing.assert_close(network(lr), model(lr), rtol=0, atol=1e-5)
    half = OptimizedOriginal(model, torch.bfloat16)(lr)
    torch.testing.assert_close(half, model(lr), rtol=0, atol=2e-2)


def test_what_they_are_not_made_for_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = CARN(nf=8, no_upsampling=True).eval()
    assert not isinstance(native.fused_encoder(network, torch.float16), NativeRows)
    monkeypatch.setattr(loaded(), "has_half", False)
    assert not isinstance(native.fused_encoder(network, torch.bfloat16), NativeRows)
    only_the_image, wide = RowGraph(), RowGraph()
    only_the_image.conv([-1], nn.Conv2d(3, 4, 3))
    wide.conv([wide.conv([-1], nn.Conv2d(3, 4, 3))], nn.Conv2d(4, 4, 11))
    for graph, reason in ((only_the_image, "image alone"), (wide, "radius")):
        with pytest.raises(ValueError, match=reason):
            half_plan(graph, 13, 4)


def test_rows_that_do_not_go_together_are_refused() -> None:
    network = FSRCNN(no_upsampling=True).eval()
    stream = NativeRows(loaded(), network.graph()).stream()
    stream.push(torch.rand(2, 4, 8, 3), False)
    for rows in (torch.rand(2, 4, 9, 3), torch.rand(1, 4, 8, 3), torch.rand(2, 4, 8, 1)):
        with pytest.raises(ValueError, match="rows is"):
            stream.push(rows, False)
    assert stream.push(torch.rand(2, 0, 8, 3), True).shape == (2, 4, 8, 56)
    with pytest.raises(ValueError, match="no image"):
        stream.push(torch.rand(2, 4, 8, 3), True)
    with pytest.raises(ValueError, match="no image"):
        NativeRows(loaded(), network.graph()).stream().push(torch.rand(1, 0, 8, 3), True)


def test_kernels_larger_than_margins_are_left_to_torch() -> None:
    graph = RowGraph()
    graph.conv([-1], nn.Conv2d(3, 4, 35))
    with pytest.raises(ValueError, match="radius is above 16"):
        NativeRows(loaded(), graph)


def test_weights_that_are_no_numbers_are_not_blamed_on_the_kernels(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = FSRCNN(no_upsampling=True).eval()
    with torch.no_grad():
        next(network.parameters())[0, 0, 0, 0] = float("nan")
    assert isinstance(native.fused_encoder(network), NativeRows)
    assert not caplog.text
