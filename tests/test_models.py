"""Every registered network, original and backbone; PCSR with any number of upsamplers."""

import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.backbones.base import SRNetwork
from models.backbones.rcan import ChannelAttention
from models.grid import GridAxis, PixelGrid
from models.pcsr import PCSR
from models.sampler import LIIFSampler
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.errors import UserError

SMALL: dict[str, dict[str, Any]] = {
    "fsrcnn": {"d": 8, "s": 4, "m": 2},
    "carn": {"nf": 8},
    "srresnet": {"nf": 8, "nb": 2},
    "rcan": {"nf": 8, "ng": 2, "nb": 1, "reduction": 4},
}
SCALE_KEY = {"fsrcnn": "upscale", "srresnet": "upscale", "carn": "scale", "rcan": "scale"}
ODD_SIZES = [(1, 1), (1, 6), (5, 1), (7, 5)]


def original(name: str, scale: int) -> SRNetwork:
    args = {**SMALL[name], SCALE_KEY[name]: scale, "no_upsampling": False}
    return models.make({"name": name, "args": args})  # type: ignore[return-value]


def backbone(name: str) -> SRNetwork:
    args = {**SMALL[name], "no_upsampling": True}
    return models.make({"name": name, "args": args})  # type: ignore[return-value]


def pcsr(upsamplers: int, name: str = "carn", hidden: list[int] | None = None) -> PCSR:
    """A small PCSR; its classifier has `hidden` layers."""
    widths = [[6], [8, 8], [10, 10, 10]][-upsamplers:]
    args: dict[str, Any] = {
        "encoder_spec": {"name": name, "args": {**SMALL[name], "no_upsampling": True}},
        "upsampler_specs": [liif(width) for width in widths],
    }
    if upsamplers > 1:
        args["classifier_spec"] = liif([5] if hidden is None else hidden)
    return models.make({"name": "pcsr", "args": args})  # type: ignore[return-value]


def liif(hidden: list[int]) -> dict[str, Any]:
    imnet = {"name": "mlp", "args": {"hidden_list": hidden}}
    return {"name": "liif-sampler", "args": {"imnet_spec": imnet}}


def test_every_backbone_is_tested() -> None:
    others = {"mlp", "liif-sampler", "pcsr", "pcsr-phase0", "pcsr-phase1"}
    assert set(models.names()) - others == set(SMALL)


# Originals and backbones


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", SMALL)
def test_original_enlarges_any_size_and_learns(name: str, scale: int) -> None:
    model = original(name, scale)
    model.eval()
    for h, w in ODD_SIZES:
        with torch.no_grad():
            assert model(torch.rand(2, 3, h, w)).shape == (2, 3, scale * h, scale * w)
    model.train()
    model(torch.rand(2, 3, 5, 4)).square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(list(model.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads) and sum(bool(g.any()) for g in grads) > 4


@pytest.mark.parametrize("name", SMALL)
def test_backbone_gives_features_of_any_size(name: str) -> None:
    model = backbone(name).eval()
    for h, w in ODD_SIZES:
        with torch.no_grad():
            assert model(torch.rand(2, 3, h, w)).shape == (2, model.out_dim, h, w)


@pytest.mark.parametrize("name", SMALL)
def test_tail_belongs_to_originals_alone(name: str) -> None:
    tail = set(original(name, 4).state_dict()) - set(backbone(name).state_dict())
    assert tail and not set(backbone(name).state_dict()) - set(original(name, 4).state_dict())


def names_of(module: nn.Module) -> set[str]:
    """Names in the state dict, without suffix and without batch norm's counters."""
    return {key.rsplit(".", 1)[0] for key in module.state_dict()}


def test_published_names_of_fsrcnn() -> None:
    body = {f"body_conv.{i}" for i in range(1, 4)} | {
        f"body_conv.{i}.{j}" for i in (0, 4) for j in (0, 1)
    }
    expected = {"norm", "head_conv.0", "head_conv.1", "tail_conv"} | body
    assert names_of(original("fsrcnn", 4)) == expected


def test_published_names_of_srresnet() -> None:
    trunk = {f"recon_trunk.{i}.conv{j}" for i in range(2) for j in (1, 2)}
    tail = {"upconv1", "upconv2", "HRconv", "conv_last"}
    assert names_of(original("srresnet", 4)) == {"norm", "conv_first"} | trunk | tail
    assert names_of(original("srresnet", 3)) == {"norm", "conv_first"} | trunk | tail - {"upconv2"}


def test_published_names_of_carn() -> None:
    fusions = {f"c{i}.{j}" for i in (1, 2, 3) for j in (0, 1)}
    block = {f"b1.body.{i}" for i in (0, 2, 4)} | fusions
    blocks = {f"b{i}.{name}" for i in (1, 2, 3) for name in block}
    tail = {"upsample.up.body.0", "upsample.up.body.3", "exit"}
    assert names_of(original("carn", 4)) == {"norm", "entry"} | blocks | fusions | tail
    assert original("carn", 4).state_dict().keys() >= {"c1.1.running_mean", "b1.b1.body.4.bias"}
    assert "c1.0.bias" not in original("carn", 4).state_dict()


def test_published_names_of_pcsr() -> None:
    spec = {
        "encoder_spec": {"name": "fsrcnn", "args": {"no_upsampling": True}},
        "heavy_sampler_spec": liif([6, 6]),
        "light_sampler_spec": liif([4]),
        "classifier_spec": liif([]),
    }
    model = models.make({"name": "pcsr-phase1", "args": spec})
    samplers = {key for key in model.state_dict() if not key.startswith(("encoder.", "norm."))}
    layers = {"heavy_sampler": (0, 2, 4), "light_sampler": (0, 2), "classifier": (0,)}
    assert samplers == {
        f"{name}.imnet.layers.{i}.{kind}"
        for name, indices in layers.items()
        for i in indices
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Any) -> None:
    model = original(name, 2).eval()
    args = {**SMALL[name], SCALE_KEY[name]: 2}
    path = tmp_path / "model.pth"
    save_checkpoint(path, {"model": {"name": name, "args": args, "sd": model.state_dict()}})
    other = original(name, 2).eval()
    load_weights(other, load_checkpoint(path)["model"]["sd"], path)
    lr = torch.rand(1, 3, 6, 5)
    assert torch.equal(model(lr), other(lr))


# How far a pixel reaches


def reach_px(change: Tensor, centre: tuple[int, int]) -> int:
    """Largest distance, in rows or columns, of a non-zero of `change` (h, w) from `centre`."""
    rows, cols = change.nonzero(as_tuple=True)
    return int(max((rows - centre[0]).abs().max(), (cols - centre[1]).abs().max()))


def far_reaching(model: SRNetwork) -> SRNetwork:
    """The model in float64 with positive weights, so that no ReLU ends a path.

    Channel attention gets fixed gates: what is left is the reach of the convolutions.
    """
    for parameter in model.parameters():
        parameter.data.abs_()
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            module.forward = lambda x: x  # type: ignore[method-assign]
    return model.eval().double()


@pytest.mark.parametrize("name", SMALL)
def test_receptive_radius_is_that_of_the_features(name: str) -> None:
    model = far_reaching(backbone(name))
    radius = model.receptive_radius_px
    side = 2 * radius + 5
    x = torch.rand(1, 3, side, side, dtype=torch.float64)
    changed = x.clone()
    changed[0, :, radius + 2, radius + 2] += 5
    with torch.no_grad():
        change = (model(changed) - model(x)).abs().sum(dim=(0, 1))
    assert reach_px(change, (radius + 2, radius + 2)) == radius


# Normalisation


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("mean", 1e39, "more than float32 can hold"), ("std", 1e39, "more than float32 can hold")]
    + [("std", value, "must be positive") for value in (0.0, -1.0, 1e-46)],
)
def test_normalisation_that_makes_no_numbers_is_refused(name, value, message) -> None:
    with pytest.raises(UserError, match=rf"`data_norm.{name}` .*{message}"):
        models.make({"name": "fsrcnn", "args": {}}, data_norm={name: [1.0, value, 1.0]})


def test_images_are_normalised_inside() -> None:
    torch.manual_seed(0)
    plain = original("fsrcnn", 2).eval()
    args = {**SMALL["fsrcnn"], "upscale": 2}
    mean, std = [0.4, 0.5, 0.6], [0.5, 0.5, 0.25]
    norm = {"mean": mean, "std": std}
    normed = models.make({"name": "fsrcnn", "args": args}, data_norm=norm).eval()
    load_weights(normed, {k: v for k, v in plain.state_dict().items() if "norm" not in k}, "plain")
    lr = torch.rand(1, 3, 4, 4)
    mean_t, std_t = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    expected = plain((lr - mean_t) / std_t) * std_t + mean_t
    torch.testing.assert_close(normed(lr), expected)


@pytest.mark.parametrize("name", ["carn", "rcan"])
def test_default_mean_is_the_published_one(name: str) -> None:
    mean = original(name, 2).state_dict()["norm.mean"].flatten()
    torch.testing.assert_close(mean, torch.tensor([0.4488, 0.4371, 0.4040]))


# The pixel grid


@pytest.mark.parametrize(
    ("lr_len", "out_len"),
    [(1, 1), (1, 7), (5, 1), (3, 6), (4, 12), (6, 24), (10, 27), (4, 6), (2, 5), (7, 5), (48, 101)],
)
def test_grid_is_the_formula_in_fractions(lr_len: int, out_len: int) -> None:
    axis = GridAxis.build(lr_len, out_len)
    for i in range(out_len):
        u = (i + Fraction(1, 2)) * Fraction(lr_len, out_len) - Fraction(1, 2)
        nearest = min(max(round(u), 0), lr_len - 1)  # Fraction rounds half to even
        assert axis.nearest[i] == nearest
        assert axis.rel[i].item() == pytest.approx(float(2 * (u - nearest)), abs=1e-7)
    assert axis.cell == pytest.approx(2 * lr_len / out_len)


def test_at_x4_positions_are_the_published_ones() -> None:
    axis = GridAxis.build(5, 20)
    assert axis.rel[:4].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert axis.cell == 0.5


# PCSR: the factorised, dense view against the straightforward one

SIZES = {2: (10, 12), 3: (15, 18), 4: (20, 24), 2.7: (14, 16), 1.5: (8, 9), "apart": (13, 24)}


@pytest.mark.parametrize("size", SIZES.values(), ids=map(str, SIZES))
@pytest.mark.parametrize("hidden", [[], [16], [16, 16, 16]], ids=len)
def test_dense_sampler_equals_the_straightforward_one(
    size: tuple[int, int], hidden: list[int]
) -> None:
    torch.manual_seed(1)
    sampler = LIIFSampler(in_dim=9, out_dim=3, imnet_spec=liif(hidden)["args"]["imnet_spec"])
    feat = torch.randn(2, 9, 5, 6)
    grid = PixelGrid.build((5, 6), size)
    weights = torch.randn(2, 3, *size)
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda own: sampler(own, grid).transpose(1, 2).unflatten(2, size),
        lambda own: sampler.dense(own, grid),
    ]
    if (scale := grid.integer_scale) is not None:
        # What GPUs take.
        ways.append(lambda own: sampler._dense_by_pixel(own, grid, scale))
    outcomes = []
    for way in ways:
        own = feat.clone().requires_grad_()
        out = way(own)
        inputs = [own, *sampler.parameters()]
        outcomes.append([out, *torch.autograd.grad((out * weights).mean(), inputs)])
    slow, *others = outcomes
    for fast in others:
        for ours, theirs in zip(fast, slow, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES.values(), ids=map(str, SIZES))
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_mixture_is_the_average_under_the_probabilities(
    size: tuple[int, int], upsamplers: int
) -> None:
    torch.manual_seed(2)
    model = pcsr(upsamplers, "fsrcnn")
    lr = torch.rand(2, 3, 5, 6)
    mixed, probs = model.mixture(lr, size)
    grid = PixelGrid.build((5, 6), size)
    feat = model.encode(lr)
    assert model.classifier is not None
    expected_probs = model.classifier(feat, grid).softmax(dim=-1)
    outputs = torch.stack([up(feat, grid) for up in model.upsamplers], dim=-1)
    residual = (outputs * expected_probs[:, :, None]).sum(dim=-1).transpose(1, 2).unflatten(2, size)
    bilinear = nn.functional.interpolate(lr, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(mixed, residual + bilinear, rtol=1e-5, atol=1e-5)
    flat = probs.flatten(2).transpose(1, 2)
    torch.testing.assert_close(flat, expected_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (4, 4)])
def test_pcsr_takes_one_pixel(size: tuple[int, int]) -> None:
    model = pcsr(2).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 1, 1), size).shape == (1, 3, *size)
        assert model.mixture(torch.rand(1, 3, 1, 2), size)[0].shape == (1, 3, *size)


@pytest.mark.parametrize("upsamplers", [2, 3])
def test_phase1_trains_lighter_upsamplers_and_classifier(upsamplers: int) -> None:
    model = pcsr(upsamplers).train()
    before = copy.deepcopy(model.state_dict())
    mixed, probs = model.mixture(torch.rand(2, 3, 5, 5), (20, 20))
    (mixed.mean() + probs[:, 0].mean()).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in trained} == {
        "classifier",
        "light_sampler",
        *(["light_sampler_1"] if upsamplers == 3 else []),
    }
    assert not model.encoder.training and model.classifier.training  # type: ignore[union-attr]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_phase0_trains_everything() -> None:
    model = pcsr(1).train()
    model(torch.rand(2, 3, 5, 5), (20, 20)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.training


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "carm"}, r"unknown model `carm` \(did you mean `carn`\?\); known: carn, fsrcnn"),
        ({"name": "carn", "args": {"nff": 8}}, r"`model.args.nff` \(did you mean `nf`\?\)"),
        ({"name": "carn", "args": {"nf": 10}}, "10 is not a multiple of group 4"),
        ({"name": "carn", "args": {"nf": 0}}, "`nf` must be 1 or more"),
        ({"name": "carn", "args": {"scale": 5}}, "scale 5"),
        ({"name": "carn", "args": {"nf": "64"}}, "`model.args.nf` must be a whole number"),
        ({"name": "fsrcnn", "args": {"no_upsampling": "no"}}, "must be true or false"),
        ({"name": "rcan", "args": {"reduction": 128}}, "reduction 128"),
        ({"name": "pcsr-phase0", "args": {}}, "`model.args.encoder_spec` is missing"),
    ],
)
def test_wrong_specs_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        models.make(spec)


def test_wrong_parts_of_pcsr_are_named() -> None:
    encoder = {"name": "carn", "args": {"nf": 8, "no_upsampling": True}}
    args = {"encoder_spec": encoder, "heavy_sampler_spec": liif([4])}
    deep = copy.deepcopy(args)
    deep["heavy_sampler_spec"]["args"]["imnet_spec"]["args"] = {"hiden_list": [4]}
    path = r"model\.args\.heavy_sampler_spec\.args\.imnet_spec\.args\.hiden_list"
    cases = [
        (deep, path),
        ({**args, "encoder_spec": {"name": "carn"}}, "`no_upsampling: true`"),
        ({**args, "heavy_sampler_spec": encoder}, "must name `liif-sampler`"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            models.make({"name": "pcsr-phase0", "args": wrong})
    three = {"encoder_spec": encoder, "upsampler_specs": [liif([4])] * 3}
    with pytest.raises(UserError, match="classifier goes with two or more"):
        models.make({"name": "pcsr", "args": three})


def test_making_does_not_change_the_spec() -> None:
    spec = {"name": "carn", "args": {"nf": 8}}
    models.make(spec, data_norm={"mean": [0, 0, 0], "std": [1, 1, 1]})
    assert spec == {"name": "carn", "args": {"nf": 8}}
