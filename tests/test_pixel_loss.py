"""L1 as published, and L2 from the iteration that a config names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from engine.objectives import make_objective
from engine.pixel_loss import PixelLoss
from models.pcsr import PCSR
from tests.training import (
    checkpoint_of,
    differences,
    make_config,
    metrics_of,
    model_spec,
    run,
)
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_logging")


def with_gradient(loss: Any, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient in the output."""
    output = output.clone().requires_grad_()
    value = loss(output, target)
    return value.detach(), torch.autograd.grad(value, output)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_one_loss_and_then_the_other_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    output, target = torch.randn(2, 2, 3, 8, 8, dtype=dtype).unbind()
    loss = PixelLoss(l2_from=3)
    for step, plain in ((0, F.l1_loss), (2, F.l1_loss), (3, F.mse_loss), (9, F.mse_loss)):
        loss.set_step(step)
        found, expected = (with_gradient(f, output, target) for f in (loss, plain))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_half_precision_is_compared_in_float32() -> None:
    torch.manual_seed(0)
    output, target = torch.rand(2, 3, 8, 8).bfloat16().unbind()
    loss = PixelLoss(l2_from=1)
    for step, plain in ((0, F.l1_loss), (1, F.mse_loss)):
        loss.set_step(step)
        expected = plain(output.float(), target.float())
        assert torch.equal(loss(output, target), expected)
        assert plain(output, target).float() != expected
    assert torch.equal(PixelLoss()(output, target), F.l1_loss(output.float(), target.float()))


def test_the_loss_that_is_not_used_does_not_spoil_the_other() -> None:
    """Where a square is too large for float32."""
    output, target = torch.full((2, 2), 1e20), torch.zeros(2, 2)
    loss = PixelLoss(l2_from=1)
    value, gradient = with_gradient(loss, output, target)
    assert torch.equal(value, F.l1_loss(output, target))
    assert torch.equal(gradient, torch.full((2, 2), 0.25))


def losses_of(save_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(save_dir) if row["kind"] == "train"]


@pytest.mark.parametrize("kind", ["fsrcnn", "fsrcnn-phase0", "fsrcnn-phase1"])
def test_a_run_that_switches_is_a_run_of_l1_and_one_of_l2(
    kind: str, pictures: Path, tmp_path: Path, phase0: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "fsrcnn-phase1":
        phase0(kind)
    keys = {"iter_print": 1}
    assert run(make_config(kind, pictures, iter_max=4, l2_from=2, **keys), tmp_path / "one") == 0
    assert caplog.text.count("iteration 2: pixels are compared by L2 (`l2_from: 2`)") == 1
    # The same, changed by hand where the first ends.
    assert run(make_config(kind, pictures, iter_max=2, **keys), tmp_path / "two") == 0
    assert run(make_config(kind, pictures, iter_max=4, l2_from=0, **keys), tmp_path / "two") == 0
    assert caplog.text.count("iteration 2: pixels are compared by L2 (`l2_from: 0`)") == 1
    one, two = (checkpoint_of(tmp_path / name) for name in ("one", "two"))
    assert not differences(one["model"], two["model"])
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")
    # Not what L1 alone gives.
    assert run(make_config(kind, pictures, iter_max=4, **keys), tmp_path / "l1") == 0
    assert losses_of(tmp_path / "l1")[:2] == losses_of(tmp_path / "one")[:2]
    assert differences(one["model"], checkpoint_of(tmp_path / "l1")["model"])


@pytest.mark.parametrize("name", ["average", "gain-regression"])
def test_phase1_compares_its_pixels_so_too(name: str) -> None:
    torch.manual_seed(0)
    model = models.make(model_spec("fsrcnn-phase1"))
    assert isinstance(model, PCSR)
    lr, hr = torch.rand(2, 3, 6, 6), torch.rand(2, 3, 24, 24)
    pixel_loss = PixelLoss(l2_from=0)
    pixel_loss.set_step(0)
    objective = make_objective(
        model,
        loss_rgb_w=1000,
        loss_avg_w=0,
        routing_loss={"name": name},
        pixel_loss=pixel_loss,
    )
    (light, heavy), _ = model.outputs(lr, (24, 24))
    mixture, _ = model.mixture(lr, (24, 24))
    expected = F.mse_loss(mixture, hr) if name == "average" else F.mse_loss(light, heavy)
    losses = objective(lr, hr)
    torch.testing.assert_close(losses["loss_rgb"], expected)
    torch.testing.assert_close(losses["loss"], 1000 * expected)


@pytest.mark.parametrize(("l2_from", "reached"), [(1, True), (2, False)])
def test_a_switch_after_the_end_is_told(
    l2_from: int, reached: bool, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(make_config("fsrcnn", pictures, iter_max=2, l2_from=l2_from), tmp_path) == 0
    note = f"`l2_from: {l2_from}` is not reached: pixels are compared by L1 throughout"
    assert (note in caplog.text) is not reached


def test_an_iteration_before_the_first_is_refused(pictures: Path) -> None:
    with pytest.raises(UserError, match="`l2_from` must be 0 or more, not -1"):
        make_config("fsrcnn", pictures, l2_from=-1)
