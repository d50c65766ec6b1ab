"""The fused kernels of the upsamplers give what the reference engine gives."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from models import kernels
from models.grid import PixelGrid
from models.inference import SRResult, super_resolve
from models.patches import super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import (
    AdaptiveRouting,
    FixedRouting,
    KRouting,
    Routing,
    classes_by_histogram,
)
from tests.processes import REPOSITORY
from tests.triton_device import (
    DEVICE,
    INTERPRETED,
    LIGHT_AND_HEAVY,
    compiled,
    halves,
    make_model,
    needs_triton,
    on_device,
    skip_bf16_in_the_interpreter,
    without_gpu,
)
from utils.errors import UserError
from utils.flops import PcsrCost

pytestmark = pytest.mark.usefixtures("exact_convolutions")


@needs_triton
@without_gpu
@pytest.mark.parametrize("name", ["test_kernels.py", "test_kernel_encoders.py"])
def test_in_the_interpreter(name: str) -> None:
    """All tests of a file that are skipped without a GPU."""
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, f"tests/{name}"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=REPOSITORY,
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


@needs_triton
@compiled
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("writes", ["sums", "first sums", "classes"])
def test_adaptive_routing_compiles_for_gpus(capability: int, writes: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from models.kernels.adaptive import _pass

    constants: dict[str, Any] = {"IS_FIRST": writes == "first sums", "TOLERANCE": 1e-4}
    constants |= {"PROGRAMS": 512, "BLOCK": 2048}
    if writes != "classes":
        constants["classes_ptr"] = None
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in _pass.arg_names}
    signature |= {"history_ptr": "*fp64", "partials_ptr": "*fp64", "classes_ptr": "*u8"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(_pass, signature, constants)
    binary = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8})
    assert binary.metadata.shared <= 48 * 1024
    assert "atom" not in binary.asm["ptx"]


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    types = {"sums_ptr": dtype, "weights_ptr": dtype, "pixels_ptr": "i32", "bounds_ptr": "i32"}
    signature = {}
    for name in kernel.arg_names:
        is_table = name.startswith(("near", "lower", "upper"))
        kind = types.get(name, "i64" if is_table else "fp32")
        number = "fp32" if name.startswith("cell") else "i32"
        signature[name] = f"*{kind}" if name.endswith("_ptr") else number
    return signature | dict.fromkeys(constants, "constexpr")


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
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(
    ("pixels", "spread", "offset"),
    [(1, 1, 0), (7, 1, 0), (500, 3, 0), (70_000, 1, 4), (70_000, 6, -3), (300_000, 40, 9)],
)
def test_adaptive_routing(pixels: int, spread: float, offset: float) -> None:
    """The histogram's classes, on images of very different spread."""
    from models.kernels.adaptive import adaptive_classes

    generator = torch.Generator().manual_seed(0)
    margins = offset + spread * torch.randn(1, 1, pixels, generator=generator)
    expected = classes_by_histogram(margins[:, None])
    programs = 4 if INTERPRETED else 512
    classes = adaptive_classes(margins.to(DEVICE), programs=programs)
    assert (classes.cpu() != expected).double().mean() <= 1e-4
    assert torch.equal(classes, adaptive_classes(margins.to(DEVICE), programs=programs))


@on_device
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("value", [-100.0, 0.0, 100.0, math.nan])
def test_adaptive_routing_without_spread_is_light(value: float) -> None:
    from models.kernels.adaptive import adaptive_classes

    margins = torch.full((2, 5, 4), value, device=DEVICE)
    assert (adaptive_classes(margins, programs=2) == 0).all()


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


@on_device
@halves
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
