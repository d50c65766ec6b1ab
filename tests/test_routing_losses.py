"""Phase 1's losses, by the config's `routing_loss`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from engine.gradients import BatchGradients
from engine.objectives import make_objective
from models.grid import PixelGrid
from models.pcsr import PCSR
from tests.training import ONE, liif, make_config, make_pictures, metrics_of, model_spec, run
from utils.errors import UserError

GAIN_LOSSES = ("gain-regression", "gain-rank")


def make(upsamplers: int = 2) -> PCSR:
    """A small model with frozen backbone, float32."""
    torch.manual_seed(0)
    spec = model_spec("fsrcnn-phase1")
    args = {
        "encoder_spec": spec["args"]["encoder_spec"],
        "upsampler_specs": [liif([4]), liif([6]), liif([8])][-upsamplers:],
        "classifier_spec": liif([5]),
    }
    model = models.make({"name": "pcsr", "args": args})
    assert isinstance(model, PCSR)
    return model


def make_loss(model: nn.Module, name: str, **args: Any) -> Any:
    spec = {"name": name, "args": args}
    return make_objective(model, loss_rgb_w=1000, loss_avg_w=3, routing_loss=spec)


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(4, 3, 6, 6), torch.rand(4, 3, 24, 24)


def test_without_a_spec_the_loss_is_the_published_one() -> None:
    model, (lr, hr) = make(3), samples()
    losses = make_objective(model, loss_rgb_w=1000, loss_avg_w=3)(lr, hr)
    grid = PixelGrid.build((6, 6), (24, 24), lr.device)
    feat = model.encode(lr)
    p = model.classifier.dense(feat, grid).softmax(dim=1)  # type: ignore[union-attr]
    parts = [p[:, j, None] * y.dense(feat, grid) for j, y in enumerate(model.upsamplers)]
    sr = sum(parts) + grid.bilinear(lr)
    share = p.numel() / 3
    load = (p.sum(dim=(0, 2, 3)) - share / 3).abs().mean() / (share / 3)
    expected = 1000 * F.l1_loss(sr, hr) + 3 * load  # type: ignore[arg-type]
    torch.testing.assert_close(losses["loss"], expected)


def test_gain_is_how_much_closer_an_upsampler_comes() -> None:
    """Against the heaviest's output and against HR, in levels, less one threshold per step."""
    outputs = [torch.full((1, 3, 4, 4), value / 255) for value in (0.0, 6.0, 10.0)]
    hr = torch.full((1, 3, 4, 4), 8 / 255)
    by_heavy = make_loss(make(3), "gain-regression", threshold=2.0).wanted_margins(outputs, hr)
    by_hr = make_loss(make(3), "gain-regression", reference="hr").wanted_margins(outputs, hr)
    assert by_heavy.shape == (1, 2, 4, 4)
    torch.testing.assert_close(by_heavy[0, :, 0, 0], torch.tensor([84**0.5 / 2 - 1, 10 / 2 - 2]))
    torch.testing.assert_close(by_hr[0, :, 0, 0], torch.tensor([60**0.5 - 1, 60**0.5 - 2]))


def test_smoothing_averages_squared_gains() -> None:
    loss = make_loss(make(), "gain-regression", smoothing_px=3)
    outputs = [torch.zeros(1, 3, 5, 5), torch.zeros(1, 3, 5, 5)]
    outputs[1][:, :, 2, 2] = 6 / 255
    wanted = loss.wanted_margins(outputs, outputs[1])
    torch.testing.assert_close(wanted[0, 0, 1:4, 1:4], torch.ones(3, 3))
    assert wanted[0, 0, 0, 0] == -1


def test_regression_is_least_at_the_expected_gain() -> None:
    loss = make_loss(make(), "gain-regression")
    wanted = torch.tensor([-1.0, 0.0, 7.0]).expand(1, 1, 1, 3)
    margin = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([margin], lr=0.25)
    for _ in range(40):
        optimizer.zero_grad()
        loss.compare(margin.expand(1, 1, 1, 3), wanted).backward()
        optimizer.step()
    assert margin.item() == pytest.approx(2.0, abs=1e-4)


def test_ranking_rewards_the_right_order_and_the_right_side_of_zero() -> None:
    loss = make_loss(make(), "gain-rank")
    wanted = torch.linspace(-1, 3, 64).view(1, 1, 8, 8)
    right, reversed_, shifted = (loss.compare(m, wanted) for m in (wanted, -wanted, wanted - 4))
    assert right < shifted < reversed_
    assert loss.compare(4 * wanted, wanted) < right


@pytest.mark.parametrize("name", GAIN_LOSSES)
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_micro_batches_give_the_gain_loss_of_the_whole_batch(name: str, upsamplers: int) -> None:
    outcomes = []
    for count in (1, 4):
        model = make(upsamplers).double()
        lr, hr = (x.double() for x in samples())
        trained = [p for p in model.parameters() if p.requires_grad]
        loss = make_loss(model, name)
        with BatchGradients(
            loss, trained, world=ONE, batch_size=4, microbatches=count
        ) as gradients:
            losses = gradients(lr, hr)
        outcomes.append([losses["loss"], *(p.grad for p in trained)])
    assert all(value is not None and value.any() for value in outcomes[0])
    for value, whole in zip(outcomes[1], outcomes[0], strict=True):
        torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_classifier_learns_from_the_gain_alone_and_upsamplers_do_not() -> None:
    model, (lr, hr) = make(), samples()
    loss = make_loss(model, "gain-regression")(lr, hr)
    light, classifier = model.upsamplers[0], model.classifier
    assert classifier is not None
    for part, key in ((light, "loss_gain"), (classifier, "loss_rgb")):
        grads = torch.autograd.grad(
            loss[key], list(part.parameters()), retain_graph=True, allow_unused=True
        )
        assert all(grad is None for grad in grads)


def test_light_upsamplers_learn_the_heaviest_or_hr() -> None:
    model, (lr, hr) = make(3), samples()
    *lights, heavy = model.outputs(lr, (24, 24))[0]
    for name, target in (("heavy", heavy), ("hr", hr)):
        loss = make_loss(model, "gain-rank", target=name)(lr, hr)["loss_rgb"]
        expected = sum((light - target).abs().mean() for light in lights) / 2
        torch.testing.assert_close(loss, expected)


def test_training_by_gain_makes_the_margins_follow_it(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    assert run(make_config("fsrcnn-phase0", pictures, iter_max=1), tmp_path / "p0") == 0
    spec = {"name": "gain-regression", "args": {"threshold": 4.0}}
    config = make_config(
        "fsrcnn-phase1",
        pictures,
        routing_loss=spec,
        iter_max=4,
        iter_print=1,
        init=str(tmp_path / "p0" / "iter_last.pth"),
    )
    assert run(config, tmp_path / "p1") == 0
    gains = [row["loss_gain"] for row in metrics_of(tmp_path / "p1")]
    assert gains[-1] < gains[0]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gain", {}, "unknown routing loss `gain`"),
        ("gain-rank", {"loss_rgb_w": 1}, "unknown key `routing_loss.args.loss_rgb_w`"),
        ("gain-rank", {"target": "light"}, "`target` must be heavy or hr"),
        ("gain-rank", {"reference": "lr"}, "`reference` must be heavy or hr"),
        ("gain-regression", {"threshold": 0}, "`threshold` must be above 0"),
        ("gain-regression", {"smoothing_px": 2}, "`smoothing_px` must be odd"),
    ],
)
def test_wrong_routing_loss_is_named(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loss(make(), name, **args)


def test_routing_loss_goes_with_a_classifier() -> None:
    model = models.make(model_spec("fsrcnn-phase0"))
    with pytest.raises(UserError, match="`routing_loss` goes with `phase: 1`"):
        make_loss(model, "gain-rank")
