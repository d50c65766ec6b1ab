"""Phase 1 with what is frozen by the compiled kernels: the same losses and gradients."""

import copy
import pickle
from typing import Any

import pytest
import torch

import models
from models.native import frozen
from models.pcsr import PCSR
from tests.test_native import has_compiler, loaded

pytestmark = has_compiler


def make_phase1(backbone: str) -> PCSR:
    """Wide enough for half precision to make a difference."""
    torch.manual_seed(0)
    args: dict[str, dict[str, Any]] = {
        "fsrcnn": {},
        "carn": {"nf": 20},
        "srresnet": {"nf": 8, "nb": 2},
        "rcan": {"nf": 8, "ng": 1, "nb": 1, "reduction": 4},
    }
    sampler = {
        width: {"name": "liif-sampler", "args": {"imnet_spec": {"name": "mlp", "args": hidden}}}
        for width, hidden in {
            "heavy": {"hidden_list": [50, 50]},
            "light": {"hidden_list": [8]},
            "classifier": {"hidden_list": [5]},
        }.items()
    }
    spec = {
        "encoder_spec": {"name": backbone, "args": {**args[backbone], "no_upsampling": True}},
        **{f"{name}_sampler_spec": sampler[name] for name in ("heavy", "light")},
        "classifier_spec": sampler["classifier"],
    }
    model = models.make({"name": "pcsr-phase1", "args": spec}).train()
    assert isinstance(model, PCSR)
    return model


def values(model: PCSR, size: tuple[int, int]) -> list[torch.Tensor]:
    """The mixture, the probabilities and all gradients."""
    torch.manual_seed(1)
    mixed, probabilities = model.mixture(torch.rand(4, 3, 9, 7), size)
    model.zero_grad()
    (mixed.float().square().mean() + probabilities.square().mean()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 8, "light upsampler and classifier alone"
    return [mixed.detach().float(), probabilities.detach(), *(grad.clone() for grad in grads)]


@pytest.mark.parametrize("size", [(36, 28), (25, 30)])
@pytest.mark.parametrize("backbone", ["fsrcnn", "carn", "srresnet", "rcan"])
def test_losses_and_gradients_are_those_of_plain_torch(
    backbone: str, size: tuple[int, int]
) -> None:
    model = make_phase1(backbone)
    ours = values(model, size)
    model.uses_kernels = False
    for one, other in zip(ours, values(model, size), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_half_precision() -> None:
    """Under autocast, where there is a matrix unit; elsewhere plain torch does it."""
    model = make_phase1("carn")
    exact = values(model, (36, 28))
    with torch.autocast("cpu", torch.bfloat16):
        ours = values(model, (36, 28))
        model.uses_kernels = False
        theirs = values(model, (36, 28))
    for one, two, other in zip(ours, theirs, exact, strict=True):
        assert (one - other).norm() <= 3e-2 * other.norm()
        assert (two - other).norm() <= 3e-2 * other.norm()
    assert torch.equal(ours[0], theirs[0]) != loaded().has_half


def test_other_weights_are_packed_again() -> None:
    model, other = make_phase1("fsrcnn"), make_phase1("fsrcnn")
    before = values(model, (36, 28))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    model.load_state_dict(other.state_dict())
    loaded_again = values(model, (36, 28))
    assert not torch.equal(loaded_again[0], before[0])
    for one, expected in zip(loaded_again, values(other, (36, 28)), strict=True):
        assert torch.equal(one, expected)


def test_models_are_copied_and_pickled_as_before() -> None:
    model = make_phase1("fsrcnn")
    expected = values(model, (36, 28))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for one, value in zip(values(other, (36, 28)), expected, strict=True):
            assert torch.equal(one, value)


def test_what_is_packed_goes_with_the_model() -> None:
    before = len(frozen._packed)
    model = make_phase1("fsrcnn")
    values(model, (36, 28))
    assert len(frozen._packed) == before + 1
    del model
    assert len(frozen._packed) == before


def test_models_made_for_inference_alone_are_left_to_torch() -> None:
    with torch.inference_mode():
        model = make_phase1("fsrcnn")
        lr = torch.rand(1, 3, 9, 7)
        mixed = model.mixture(lr, (36, 28))[0]
        model.uses_kernels = False
        assert torch.equal(model.mixture(lr, (36, 28))[0], mixed)
