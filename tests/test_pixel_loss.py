"""L1 as published, and L2 or PSNR from the iteration that a config names."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import models
from engine.objectives import make_objective
from engine.pixel_loss import FLOOR, PixelLoss, negative_psnr
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
    for starts, losses in (
        ({"l2_from": 3}, {0: F.l1_loss, 2: F.l1_loss, 3: F.mse_loss, 9: F.mse_loss}),
        ({"psnr_from": 0}, {0: negative_psnr, 9: negative_psnr}),
        ({"l2_from": 0, "psnr_from": 4}, {0: F.mse_loss, 3: F.mse_loss, 4: negative_psnr}),
        ({"psnr_from": 2, "l2_from": 4}, {1: F.l1_loss, 2: negative_psnr, 4: F.mse_loss}),
    ):
        loss = PixelLoss(**starts)
        for step, plain in losses.items():
            loss.set_step(step)
            found, expected = (with_gradient(f, output, target) for f in (loss, plain))
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_negative_psnr_is_what_is_measured_and_weighs_images_alike() -> None:
    """But for the floor: an image at 10 dB counts in full, one at 70 dB almost nothing."""
    torch.manual_seed(0)
    target = torch.randint(0, 256, (3, 3, 32, 32)).double() / 255
    noise = torch.tensor([0.3, 0.1, 0.0003], dtype=torch.float64).view(3, 1, 1, 1)
    output = target + noise * torch.randn_like(target)
    mse_B = (output - target).square().mean(dim=(1, 2, 3))
    value, gradient = with_gradient(negative_psnr, output, target)
    expected = -np.mean([psnr_of_mse(mse.item() + FLOOR) for mse in mse_B])
    assert value.item() == pytest.approx(expected, rel=1e-12)
    # Of the loss in the logarithm of an image's MSE; without the floor all would be 10 / ln 10 / 3.
    slopes = (gradient * (output - target)).sum(dim=(1, 2, 3)) / 2
    shares = mse_B / (mse_B + FLOOR)
    torch.testing.assert_close(slopes, 10 / math.log(10) / 3 * shares)
    assert shares[0] > 0.98
    assert shares[2] < 0.002


def psnr_of_mse(mse: float) -> float:
    return -10 * math.log10(mse)


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
@pytest.mark.parametrize(("key", "name"), [("l2_from", "L2"), ("psnr_from", "PSNR")])
def test_a_run_that_switches_is_a_run_of_l1_and_one_of_the_other(
    key: str,
    name: str,
    kind: str,
    pictures: Path,
    tmp_path: Path,
    phase0: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if kind == "fsrcnn-phase1":
        phase0(kind)

    def train(folder: str, iterations: int, **keys: int) -> None:
        config = make_config(kind, pictures, iter_max=iterations, iter_print=1, **keys)
        assert run(config, tmp_path / folder) == 0

    train("one", 4, **{key: 2})
    assert caplog.text.count(f"iteration 2: pixels are compared by {name} (`{key}: 2`)") == 1
    # The same, changed by hand where the first ends.
    train("two", 2)
    train("two", 4, **{key: 0})
    assert caplog.text.count(f"iteration 2: pixels are compared by {name} (`{key}: 0`)") == 1
    one, two = (checkpoint_of(tmp_path / folder) for folder in ("one", "two"))
    assert not differences(one["model"], two["model"])
    assert losses_of(tmp_path / "one") == losses_of(tmp_path / "two")
    # A line's means are of one loss alone.
    config = make_config(kind, pictures, iter_max=4, iter_print=4, **{key: 2})
    assert run(config, tmp_path / "few") == 0
    (few,) = losses_of(tmp_path / "few")
    assert few == pytest.approx(sum(losses_of(tmp_path / "one")[2:]) / 2)
    # Not what L1 alone gives.
    train("l1", 4)
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


@pytest.mark.parametrize(("key", "name"), [("l2_from", "L2"), ("psnr_from", "PSNR")])
@pytest.mark.parametrize(("start", "reached"), [(1, True), (2, False)])
def test_a_switch_after_the_end_is_told(
    key: str,
    name: str,
    start: int,
    reached: bool,
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert run(make_config("fsrcnn", pictures, iter_max=2, **{key: start}), tmp_path) == 0
    note = f"`{key}: {start}` is not reached: pixels are never compared by {name}"
    assert (note in caplog.text) is not reached


@pytest.mark.parametrize("key", ["l2_from", "psnr_from"])
def test_an_iteration_before_the_first_is_refused(key: str, pictures: Path) -> None:
    with pytest.raises(UserError, match=f"`{key}` must be 0 or more, not -1"):
        make_config("fsrcnn", pictures, **{key: -1})


def test_both_from_the_same_iteration_are_refused(pictures: Path) -> None:
    with pytest.raises(UserError, match="`l2_from` and `psnr_from` are equal"):
        make_config("fsrcnn", pictures, l2_from=3, psnr_from=3)
