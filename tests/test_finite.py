"""Outputs that are no numbers: computed again, or refused."""

from pathlib import Path

import pytest
import torch

import models
from engine.finite import check_finite, is_finite
from engine.loading import load_original, load_pcsr
from engine.restore import OriginalRestorer, PcsrRestorer
from models.backbones.base import SRNetwork
from models.packed import PackedSampler
from models.pcsr import PCSR
from tests.test_fast import make_model, mlp
from utils.config import check_config
from utils.errors import UserError

SIZE = (24, 32)


@pytest.fixture
def lr() -> torch.Tensor:
    return torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(0))


def with_weight(value: float) -> PCSR:
    """A model with one large weight in the last layer of its backbone."""
    model = make_model("srresnet")
    with torch.no_grad():
        list(model.encoder.parameters())[-2].flatten()[0] = value
    return model


def test_what_overflows_in_half_precision_is_computed_again(
    lr: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = with_weight(3e8)
    exact = PcsrRestorer(model)(lr, SIZE)
    assert is_finite(exact.sr)
    again = PcsrRestorer(model, precision="fp16")(lr, SIZE)
    assert torch.equal(again.sr, exact.sr)
    assert "overflows in half precision" in caplog.text
    unchecked = PcsrRestorer(model, precision="fp16", checked=False)(lr, SIZE)
    assert not is_finite(unchecked.sr)


@pytest.mark.parametrize("factor", [1e6, 1e7])
def test_what_overflows_in_the_middle_is_noticed(
    factor: float, lr: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """Infinities that are subtracted from each other pass through ReLUs before they are seen."""
    model = make_model("srresnet")
    with torch.no_grad():
        for parameter in model.encoder.get_submodule("conv_first").parameters():
            parameter.mul_(factor)
        for sampler in [*model.upsamplers, model.classifier]:
            assert sampler is not None
            sampler.imnet.linears[0].weight[:, : sampler.in_dim].div_(factor)
    exact = PcsrRestorer(model)(lr, SIZE)
    again = PcsrRestorer(model, precision="fp16")(lr, SIZE)
    assert torch.equal(again.sr, exact.sr)
    assert "overflows in half precision" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_of_either_sign_passes_through_an_mlp(sign: float, dtype: torch.dtype) -> None:
    packed = PackedSampler.pack(make_model("srresnet").upsamplers[-1], dtype=dtype)
    x = torch.zeros(40, packed.feature_CD.shape[1])
    x[7] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
    assert packed.finish(x).isnan().any(0).nonzero().flatten().tolist() == [7]


def test_a_config_without_a_norm_of_its_own_is_named(tmp_path: Path) -> None:
    """A backbone has none, and is not what is asked for."""
    spec = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "no_upsampling": True}}
    path = tmp_path / "a.pth"
    torch.save({"model": {**spec, "sd": models.make(spec).state_dict()}}, path)
    norm = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    config = check_config({"model": spec, "data_norm": norm}, "fsrcnn")
    with pytest.raises(UserError, match="is not an original super-resolution network"):
        load_original(path, torch.device("cpu"), config)


def test_what_is_no_number_in_fp32_is_refused(lr: torch.Tensor) -> None:
    with pytest.raises(UserError, match="holds NaN or infinity"):
        PcsrRestorer(with_weight(float("inf")))(lr, SIZE)
    original = models.make({"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 2}})
    assert isinstance(original, SRNetwork)
    with torch.no_grad():
        next(original.parameters())[0] = float("nan")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        OriginalRestorer(original.eval())(lr)


def test_damaged_weights_are_named_when_they_are_loaded(tmp_path: Path) -> None:
    model = with_weight(float("nan"))
    specs = [mlp(9, 7), mlp(21, 20, 19), mlp(10)]
    encoder = {"name": "srresnet", "args": {"nf": 8, "nb": 2, "no_upsampling": True}}
    args = {"encoder_spec": encoder, "upsampler_specs": specs[:2], "classifier_spec": specs[2]}
    path = tmp_path / "a.pth"
    torch.save({"model": {"name": "pcsr", "args": args, "sd": model.state_dict()}}, path)
    with pytest.raises(UserError, match=r"a.pth is damaged: encoder\..* holds NaN or infinity"):
        load_pcsr(path, torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_is_enough(value: float) -> None:
    image = torch.rand(3, 40, 50)
    check_finite(image)
    check_finite(image * 3e38)  # whose sum is none
    image[1, 20, 30] = value
    with pytest.raises(UserError):
        check_finite(image)
