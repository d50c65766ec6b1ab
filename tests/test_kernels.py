"""The fused kernels give what the reference engine gives.

They run on a GPU where there is one, else in Triton's interpreter. The interpreter has to be chosen
before Triton is first imported, so this file then runs itself in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import kernels
from models.backbones.base import SRNetwork
from models.grid import PixelGrid
from models.inference import SRResult, super_resolve, super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from models.row_graph import RowGraph, sequential_graph
from utils.errors import UserError
from utils.flops import PcsrCost

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
on_device = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or DEVICE.type == "cuda")),
    reason="no GPU: test_in_the_interpreter runs this",
)
compiled = pytest.mark.skipif(INTERPRETED, reason="about the compiler, not the interpreter")


@pytest.fixture(autouse=True)
def exact_convolutions() -> Any:
    """On a GPU, PyTorch's convolutions round to tf32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@needs_triton
@compiled
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the kernels run on the GPU itself")
def test_in_the_interpreter() -> None:
    """All tests of this file that are skipped without a GPU."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            __file__,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = kernels.why_unavailable(torch.device("cuda"))
    assert reason is not None and "Triton is not installed" in reason
    assert not kernels.available(torch.device("cuda"))


@compiled
def test_not_for_the_cpu() -> None:
    assert not kernels.available(torch.device("cpu"))


@needs_triton
@compiled
@pytest.mark.parametrize(
    ("capability", "dtype", "instruction"),
    [(80, "fp32", "mma.sync"), (90, "bf16", "wgmma")],
)
def test_compiles_for_gpus(capability: int, dtype: str, instruction: str) -> None:
    """CARN's heavy upsampler: for matrix units, and with little enough shared memory for all."""
    import triton
    from triton.backends.compiler import GPUTarget

    from models.kernels.pixel_mlp import COMPILER_OPTIONS, launch_options, pixel_mlp
    from models.kernels.weights import Pieces

    is_fp32 = dtype == "fp32"
    pieces = Pieces.of(74, 32 if is_fp32 and capability < 90 else 64)
    options = launch_options(torch.float32 if is_fp32 else torch.float16, pieces.width)
    constants = {
        "OUTPUTS": 3,
        "LAYERS": 4,
        "SIZES": pieces.sizes,
        "STARTS": pieces.starts,
        "OUT_SIZES": (16,),
        "PRECISION": "tf32x3" if is_fp32 else "ieee",
        "BLOCK": options.pop("BLOCK"),
    }
    source = triton.compiler.ASTSource(
        pixel_mlp, _signature(pixel_mlp, constants, dtype), constants
    )
    binary = triton.compile(
        source, GPUTarget("cuda", capability, 32), {**COMPILER_OPTIONS, **options}
    )
    assert instruction in binary.asm["ptx"]
    assert binary.metadata.shared <= 99 * 1024


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    types = {"sums_ptr": dtype, "weights_ptr": dtype, "pixels_ptr": "i32", "bounds_ptr": "i32"}
    signature = {}
    for name in kernel.arg_names:
        is_table = name.startswith(("near", "lower", "upper"))
        kind = types.get(name, "i64" if is_table else "fp32")
        number = "fp32" if name.startswith("cell") else "i32"
        signature[name] = f"*{kind}" if name.endswith("_ptr") else number
    return signature | dict.fromkeys(constants, "constexpr")


def mlp(*hidden: int) -> dict[str, Any]:
    """Spec of a sampler."""
    imnet = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
    return {"name": "liif-sampler", "args": {"imnet_spec": imnet}}


def make_model(*upsamplers: tuple[int, ...], classifier: tuple[int, ...] = (10,)) -> PCSR:
    """A small model on the device, with a std and with a classifier that is undecided."""
    torch.manual_seed(0)
    spec = {
        "encoder_spec": {"name": "fsrcnn", "args": {"d": 12, "m": 1, "no_upsampling": True}},
        "upsampler_specs": [mlp(*hidden) for hidden in upsamplers],
        "data_norm": {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.25, 2.0]},
    }
    if len(upsamplers) > 1:
        spec["classifier_spec"] = mlp(*classifier)
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


LIGHT_AND_HEAVY = ((5,), (21, 20, 19))


def run_both(
    model: PCSR, lr: torch.Tensor, size: tuple[int, int], routing: Routing, **options: Any
) -> tuple[SRResult, SRResult]:
    """The reference's result and the kernels'."""
    from models.fused import FusedEngine

    lr = lr.to(DEVICE)
    log_costs = PcsrCost.of(model).log_costs((lr.shape[-2], lr.shape[-1]), size)
    engines = (ReferenceEngine(model), FusedEngine(model, **options))
    reference, fused = (super_resolve(engine, lr, size, routing, log_costs) for engine in engines)
    return reference, fused


def check_equal(*args: Any, **options: Any) -> SRResult:
    """Both engines: same classes, counts and picture."""
    reference, fused = run_both(*args, **options)
    assert torch.equal(fused.classes, reference.classes)
    assert fused.pixel_counts == reference.pixel_counts
    torch.testing.assert_close(fused.sr, reference.sr, rtol=0, atol=1e-5)
    return fused


@on_device
@pytest.mark.parametrize("size", [(36, 28), (24, 19), (14, 10)], ids=["x4", "x2.7", "x1.5"])
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_every_scale_and_number_of_upsamplers(size: tuple[int, int], upsamplers: int) -> None:
    model = make_model(*((5,), (9, 7), (21, 20, 19))[-upsamplers:])
    result = check_equal(model, torch.rand(2, 3, 9, 7), size, KRouting(0.0))
    assert min(result.pixel_counts) > 0


@on_device
def test_one_upsampler() -> None:
    check_equal(make_model((21, 20)), torch.rand(1, 3, 5, 6), (13, 12), FixedRouting(-1))


@on_device
def test_layers_of_several_pieces() -> None:
    model = make_model((40, 33), (74, 70))
    check_equal(model, torch.rand(1, 3, 5, 6), (10, 12), KRouting(0.0))


@on_device
def test_mlps_without_hidden_layer() -> None:
    model = make_model((), (9,), classifier=())
    check_equal(model, torch.rand(1, 3, 9, 7), (36, 28), AdaptiveRouting())
    check_equal(model, torch.rand(1, 3, 9, 7), (25, 28), AdaptiveRouting())


@on_device
@pytest.mark.parametrize("index", [0, 1, -1])
def test_empty_classes(index: int) -> None:
    model = make_model((5,), (9, 7), (8,))
    check_equal(model, torch.rand(1, 3, 4, 5), (8, 15), FixedRouting(index))


@on_device
@pytest.mark.parametrize("lr_size", [(1, 1), (1, 9), (9, 1)])
def test_smallest_images(lr_size: tuple[int, int]) -> None:
    model = make_model(*LIGHT_AND_HEAVY)
    lr = torch.rand(2, 3, *lr_size)
    check_equal(model, lr, (1, 1), KRouting(0.0))
    check_equal(model, lr, (lr_size[0] * 4, lr_size[1] * 4), KRouting(0.0))


@on_device
@pytest.mark.parametrize("size", [(36, 28), (25, 19), (5, 19)])
def test_runs_of_rows(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid in parts, some of which have no output row at the smallest size."""
    monkeypatch.setattr("models.fused._LEAST_RADII", 0)
    model = make_model(*LIGHT_AND_HEAVY)
    check_equal(model, torch.rand(1, 3, 9, 7), size, KRouting(0.0), run_px=7)


@on_device
def test_patches() -> None:
    from models.fused import FusedEngine

    model = make_model(*LIGHT_AND_HEAVY)
    lr = torch.rand(1, 3, 12, 8, device=DEVICE)
    log_costs = PcsrCost.of(model).log_costs((8, 8), (16, 16))
    reference, fused = (
        super_resolve_patches(
            engine, lr, 2, AdaptiveRouting(), log_costs, patch_size=8, step=4, patch_batch_size=2
        )
        for engine in (ReferenceEngine(model), FusedEngine(model))
    )
    assert torch.equal(fused.classes, reference.classes)
    assert fused.pixel_counts == reference.pixel_counts
    torch.testing.assert_close(fused.sr, reference.sr, rtol=0, atol=1e-5)


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def skip_bf16_in_the_interpreter(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter takes the bits of bf16 for integers in products")


@on_device
@HALVES
@pytest.mark.parametrize(
    "heavy", [(21, 20, 19), (74, 74, 74), (70, 130)], ids=["one piece", "several", "wide"]
)
def test_half_precision(dtype: torch.dtype, heavy: tuple[int, ...]) -> None:
    skip_bf16_in_the_interpreter(dtype)
    model = make_model((5,), heavy)
    lr = torch.rand(1, 3, 9, 7)
    reference, fused = run_both(model, lr, (18, 14), FixedRouting(-1), dtype=dtype)
    assert fused.sr.dtype == torch.float32
    error = (fused.sr - reference.sr).norm() / reference.sr.norm()
    assert 0 < error < 0.01


@on_device
@pytest.mark.parametrize("routing", [KRouting(0.0), FixedRouting(0)])
def test_flops_are_predicted(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    from models.cost import count_rows
    from models.fused import FusedEngine

    monkeypatch.setattr("models.fused._LEAST_RADII", 0)
    model = make_model(*LIGHT_AND_HEAVY)
    _, fused = run_both(model, torch.rand(1, 3, 9, 7), (25, 28), routing, run_px=14)
    engine = FusedEngine(model, run_px=14)
    cost = engine.cost(PixelGrid.build((9, 7), (25, 28)), engine.run_rows((9, 7)))
    assert fused.mlp_flops == cost.total(count_rows(fused.classes, 2))


@on_device
@pytest.mark.parametrize(("shape", "count"), [((1, 1, 1), 2), ((2, 50, 41), 3), ((1, 64, 64), 5)])
def test_partition(shape: tuple[int, int, int], count: int) -> None:
    from models.kernels.partition import Partition

    torch.manual_seed(0)
    classes = torch.randint(0, count, shape, dtype=torch.uint8).to(DEVICE)
    # One class in the middle does not occur.
    classes[classes == count // 2] = 0
    partition = Partition.of(classes, count)
    expected, order = classes.flatten().sort(stable=True)
    assert torch.equal(partition.pixels_Q.long(), order)
    assert partition.counts() == expected.bincount(minlength=count).tolist()


@on_device
def test_wrong_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import fused

    model = make_model(*LIGHT_AND_HEAVY)
    apply_mlp = fused.apply_mlp

    def apply_wrongly(mlp: Any, feat: torch.Tensor, *args: Any, **options: Any) -> None:
        apply_mlp(mlp, feat.flip(3), *args, **options)

    monkeypatch.setattr(fused, "apply_mlp", apply_wrongly)
    with pytest.raises(UserError, match="margins are wrong"):
        fused.FusedEngine(model)


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
@HALVES
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
