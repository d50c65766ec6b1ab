"""The fast engine gives what the reference engine gives."""

import shutil
from collections.abc import Callable

import pytest
import torch

import models
from engine.engines import make_engine
from models import native
from models.backbones.base import SRNetwork
from models.compiled import CompiledEncoder
from models.fast import FastEngine
from models.inference import Engine, SRResult, super_resolve
from models.native_engine import NativeEngine
from models.optimized import OptimizedOriginal
from models.patches import super_resolve_patches
from models.pcsr import PCSR
from models.reference import ReferenceEngine
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from utils.errors import UserError
from utils.flops import PcsrCost, executed_flops

BACKBONES = {
    "fsrcnn": {"d": 12, "s": 6, "m": 2},
    "carn": {"nf": 12},
    "srresnet": {"nf": 8, "nb": 2},
    "rcan": {"nf": 8, "ng": 2, "nb": 2, "reduction": 4},
}


def mlp(*hidden: int) -> dict:
    """Spec of a sampler."""
    imnet = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
    return {"name": "liif-sampler", "args": {"imnet_spec": imnet}}


def make_model(backbone: str, upsamplers: int = 2, classifier: tuple[int, ...] = (10,)) -> PCSR:
    """A model with random weights whose classifier is undecided, so that all classes occur."""
    torch.manual_seed(0)
    encoder = {"name": backbone, "args": {**BACKBONES[backbone], "no_upsampling": True}}
    specs = [mlp(5), mlp(9, 7), mlp(21, 20, 19)][-upsamplers:]
    spec = {"encoder_spec": encoder, "upsampler_specs": specs}
    if upsamplers > 1:
        spec["classifier_spec"] = mlp(*classifier)
    model = models.make({"name": "pcsr", "args": spec}).eval()
    assert isinstance(model, PCSR)
    randomise_statistics(model)
    with torch.no_grad():
        if model.classifier is not None:
            last = model.classifier.imnet.linears[-1]
            last.weight.mul_(20)
            lr = torch.rand(1, 3, 9, 7)
            logits = model.classifier(model.encode(lr), grid_of(lr, (36, 28)))
            last.bias.sub_(logits.mean(dim=(0, 1)))
    return model


def randomise_statistics(model: torch.nn.Module) -> None:
    """Give batch norms something to do."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def grid_of(lr: torch.Tensor, size: tuple[int, int]) -> models.pcsr.PixelGrid:
    """The pixel grid from `lr` to `size`."""
    return models.pcsr.PixelGrid.build((lr.shape[-2], lr.shape[-1]), size)


def check_equal(model: PCSR, lr: torch.Tensor, size: tuple[int, int], routing: Routing) -> None:
    """All engines: same classes, counts and picture."""
    log_costs = PcsrCost.of(model).log_costs((lr.shape[-2], lr.shape[-1]), size)
    check_engines(model, lambda engine: super_resolve(engine, lr, size, routing, log_costs))


def check_engines(model: PCSR, infer: Callable[[Engine], SRResult]) -> None:
    """Compare what the engines infer with what the reference engine does."""
    # Small blocks, so that these small images have many.
    engines: list[Engine] = [FastEngine(model, block_px=40, chunk_px=60, run_px=15)]
    if (library := native.library()) is not None:
        engines.append(NativeEngine(library, model, run_px=15))
    reference = infer(ReferenceEngine(model))
    for engine in engines:
        fast = infer(engine)
        assert torch.equal(fast.classes, reference.classes)
        assert fast.pixel_counts == reference.pixel_counts
        torch.testing.assert_close(fast.sr, reference.sr, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
@pytest.mark.parametrize("size", [(36, 28), (18, 14), (27, 21), (25, 30), (9, 7), (5, 40)])
def test_every_backbone_at_every_scale(backbone: str, size: tuple[int, int]) -> None:
    model = make_model(backbone)
    check_equal(model, torch.rand(2, 3, 9, 7), size, KRouting(0.0))


@pytest.mark.parametrize("upsamplers", [1, 2, 3])
@pytest.mark.parametrize("routing", [KRouting(0.5), FixedRouting(-1), FixedRouting(0)])
def test_every_number_of_upsamplers(upsamplers: int, routing: Routing) -> None:
    model = make_model("carn", upsamplers)
    check_equal(model, torch.rand(1, 3, 9, 7), (36, 28), routing)


@pytest.mark.parametrize("lr_size", [(1, 1), (1, 30), (30, 1), (13, 50)])
def test_odd_sizes(lr_size: tuple[int, int]) -> None:
    lr = torch.rand(1, 3, *lr_size)
    check_equal(make_model("fsrcnn"), lr, (lr_size[0] * 4, lr_size[1] * 4), AdaptiveRouting())


def test_classifier_without_hidden_layer() -> None:
    model = make_model("fsrcnn", classifier=())
    check_equal(model, torch.rand(1, 3, 9, 7), (36, 28), AdaptiveRouting())
    check_equal(model, torch.rand(1, 3, 9, 7), (31, 28), AdaptiveRouting())


def test_data_norm_with_std() -> None:
    """The residual is scaled by std, the bilinear part is not."""
    model = make_model("carn")
    model.norm.std.copy_(torch.tensor([0.5, 0.25, 2.0]).view(1, 3, 1, 1))
    check_equal(model, torch.rand(1, 3, 9, 7), (36, 28), KRouting(0.0))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_patches(batch_size: int) -> None:
    model = make_model("carn")
    lr = torch.rand(1, 3, 60, 60)
    log_costs = PcsrCost.of(model).log_costs((32, 32), (128, 128))
    check_engines(
        model,
        lambda engine: super_resolve_patches(
            engine, lr, 4, AdaptiveRouting(), log_costs, patch_batch_size=batch_size
        ),
    )


def test_executed_flops_are_those_of_the_matrix_products() -> None:
    """The engine's own count against torch's counter, all-heavy on whole strips."""
    model = make_model("fsrcnn")
    engine = FastEngine(model)
    lr = torch.rand(1, 3, 8, 8)
    grid = grid_of(lr, (32, 32))
    feat = engine.encode(lr)
    classes = torch.ones(1, 32, 32, dtype=torch.uint8)
    classify = CountedCall(lambda: engine.classify(feat, grid)[1])
    upsample = CountedCall(lambda: engine.upsample(lr, feat, grid, classes).flops)
    for call in (classify, upsample):
        assert call.reported == executed_flops(call)


class CountedCall(torch.nn.Module):
    """A call as a module, for torch's FLOP counter; `reported` is what the call returns."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.reported = call()

    def forward(self) -> int:
        return self.call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(36, 28), (25, 30)])
def test_half_precision_is_close(dtype: torch.dtype, size: tuple[int, int]) -> None:
    model = make_model("carn")
    lr = torch.rand(1, 3, 9, 7)
    log_costs = PcsrCost.of(model).log_costs((9, 7), size)
    full, half = (
        super_resolve(FastEngine(model, dtype=d), lr, size, FixedRouting(-1), log_costs).sr
        for d in (torch.float32, dtype)
    )
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.02)
    assert not torch.equal(half, full)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_optimized_original_is_the_original(backbone: str) -> None:
    torch.manual_seed(0)
    model = models.make({"name": backbone, "args": BACKBONES[backbone]}).eval()
    assert isinstance(model, SRNetwork)
    randomise_statistics(model)
    lr = torch.rand(2, 3, 9, 7)
    with torch.inference_mode():
        torch.testing.assert_close(OptimizedOriginal(model)(lr), model(lr), rtol=0, atol=1e-5)


def test_features_that_do_not_fit_are_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("carn")
    lr = torch.rand(1, 3, 30, 7)
    log_costs = PcsrCost.of(model).log_costs((30, 7), (120, 28))
    engine = FastEngine(model, run_px=15)
    kept = super_resolve(engine, lr, (120, 28), AdaptiveRouting(), log_costs)
    monkeypatch.setattr("models.inference.KEPT_FEATURES", 250)
    again = super_resolve(engine, lr, (120, 28), AdaptiveRouting(), log_costs)
    assert (kept.encoder_passes, again.encoder_passes) == (1, 2)
    assert torch.equal(kept.sr, again.sr)
    assert 0 < again.pixel_counts[1] < 120 * 28


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_encoder_is_the_encoder() -> None:
    model = make_model("fsrcnn")
    lr = torch.rand(1, 3, 9, 7)
    engine = make_engine(model, compiled=True)
    assert isinstance(engine, FastEngine)
    assert isinstance(engine.encoder, CompiledEncoder)
    plain, compiled = (
        super_resolve(make_engine(model, compiled=word), lr, (36, 28), KRouting(0.0), (0.0, 0.7)).sr
        for word in (False, True)
    )
    assert torch.allclose(plain, compiled, atol=1e-4)


def test_only_the_fast_engine_is_compiled() -> None:
    with pytest.raises(UserError, match="--compile"):
        make_engine(make_model("fsrcnn"), "reference", compiled=True)
