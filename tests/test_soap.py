"""SOAP: its formula, what it is for, and its checkpoints."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.optim import OPTIMIZERS, load_optimizer
from engine.soap import Soap
from utils.errors import UserError

SHAPES = ((6, 3, 3, 3), (4, 6), (5,))


def make(*shapes: tuple[int, ...], **args: Any) -> torch.optim.Optimizer:
    spec = {"name": "soap", "args": {"lr": 0.01, **args}}
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes or SHAPES]
    return OPTIMIZERS.make(spec, "optimizer", params=params)


def weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def steps(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps with gradients that depend on the step's number alone."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for weight in weights(optimizer):
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def by_the_paper(
    weight: Tensor,
    gradients: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    shampoo_beta: float,
    eps: float,
    frequency: int,
    longest: int,
) -> Tensor:
    """One weight, one axis after the other; nothing shared with `engine.soap`."""

    def turned(x: Tensor, *, back: bool = False) -> Tensor:
        for axis, basis in bases.items():
            matrix = basis if back else basis.mT
            x = torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)
        return x

    def outer(x: Tensor, axis: int) -> Tensor:
        rows = x.movedim(axis, 0).flatten(1)
        return rows @ rows.mT

    first, *others = [x.reshape(*x.shape[:2], -1) if x.dim() > 2 else x for x in gradients]
    axes = [i for i, n in enumerate(first.shape) if first.dim() > 1 and 1 < n <= longest]
    covariances = {axis: (1 - shampoo_beta) * outer(first, axis) for axis in axes}
    bases = {axis: torch.linalg.eigh(covariances[axis])[1] for axis in axes}
    mean, square = torch.zeros_like(first), torch.zeros_like(first)
    weight = weight.clone()
    for t, gradient in enumerate(others, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * turned(gradient) ** 2
        root = (square / (1 - betas[1] ** t)).sqrt() + eps
        step = turned(turned(mean) / (1 - betas[0] ** t) / root, back=True)
        weight -= lr * step.reshape(weight.shape)
        for axis in axes:
            old = covariances[axis]
            covariances[axis] = shampoo_beta * old + (1 - shampoo_beta) * outer(gradient, axis)
            if t % frequency == 0:
                basis, new = bases[axis], covariances[axis]
                order = (basis.mT @ new @ basis).diagonal().argsort(descending=True)
                square = square.index_select(axis, order)
                bases[axis] = torch.linalg.qr(new @ basis[:, order])[0]
    return weight


@pytest.mark.parametrize("longest", [1024, 6])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (7, 7), (5,)])
def test_steps_are_the_papers(shape: tuple[int, ...], longest: int) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Which rows are the largest changes, and with it the order of the eigenvectors.
    sizes = torch.logspace(-1, 1, shape[0], dtype=torch.float64)
    sizes = sizes.reshape(-1, *[1] * (len(shape) - 1))
    start = draw()
    gradients = [draw() * (sizes if k < 6 else 1 / sizes) for k in range(15)]
    weight = nn.Parameter(start.clone())
    args: dict[str, Any] = {"betas": (0.9, 0.7), "shampoo_beta": 0.8, "eps": 1e-3}
    optimizer = Soap([weight], 0.01, precondition_frequency=3, max_precondition_dim=longest, **args)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    expected = by_the_paper(start, gradients, lr=0.01, frequency=3, longest=longest, **args)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-10, rtol=0)


def test_the_first_steps_of_a_matrix_by_hand() -> None:
    """The first gradient gives the bases, in which the second one's step is its sign."""
    optimizer = make((4, 4))
    (weight,) = weights(optimizer)
    first, second = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    before = weight.detach().clone()
    weight.grad = first
    optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = second
    optimizer.step()
    u, _, vh = torch.linalg.svd(first)
    expected = 0.01 * u @ torch.sign(u.mT @ second @ vh.mT) @ vh
    torch.testing.assert_close(before - weight, expected, atol=1e-5, rtol=0)


def test_a_turned_problem_has_turned_steps() -> None:
    """Where Adam's steps depend on the coordinates, these do not."""
    generator = torch.Generator().manual_seed(2)
    # Doubles: early steps are little more than signs, of small numbers, too.
    turn, start = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(turn)[0]
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(turn @ start)
    optimizers = [Soap([plain], 0.01), Soap([turned], 0.01)]
    for _ in range(25):
        gradient = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        plain.grad, turned.grad = gradient, turn @ gradient
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(turned, turn @ plain, atol=1e-6, rtol=0)


def test_weights_of_one_axis_have_adams_steps() -> None:
    soap = make((7,), betas=[0.9, 0.99])
    (own,) = weights(soap)
    other = nn.Parameter(own.detach().clone())
    adam = torch.optim.Adam([other], lr=0.01, betas=(0.9, 0.99))
    own.grad = torch.ones(7)
    soap.step()  # moves nothing
    for number in range(5):
        own.grad = torch.randn(7, generator=torch.Generator().manual_seed(number))
        other.grad = own.grad.clone()
        soap.step()
        adam.step()
    torch.testing.assert_close(own, other, atol=1e-6, rtol=0)


def test_long_axes_are_left_as_they_are() -> None:
    optimizer = make((6, 3), max_precondition_dim=4)
    steps(optimizer, 0, 1)
    assert set(optimizer.state[weights(optimizer)[0]]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "covariance_1",
        "basis_1",
    }


def test_eigenvectors_follow_the_covariance() -> None:
    """Gradients of one constant covariance: the bases make it diagonal, largest first."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(5, 5, generator=generator) * torch.tensor([4.0, 2, 1, 0.5, 0.25])
    optimizer = make((5, 40), precondition_frequency=1, shampoo_beta=0.99)
    (weight,) = weights(optimizer)
    for _ in range(300):
        weight.grad = root @ torch.randn(5, 40, generator=generator)
        optimizer.step()
    basis = optimizer.state[weight]["basis_0"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5), atol=1e-5, rtol=0)
    turned = basis.mT @ root @ root.mT @ basis
    variances = turned.diagonal()
    assert (variances.diff() < 0).all()
    correlation = turned / (variances[:, None] * variances).sqrt()
    assert (correlation - torch.eye(5)).abs().max() < 0.15


@pytest.mark.parametrize("seed", range(6))
def test_a_badly_conditioned_problem_takes_fewer_steps_than_adams(seed: int) -> None:
    """Least squares in coordinates that mix rates of 1 to 1000; gradients are of half the rank."""

    def error_after(optimizer_of: Any) -> float:
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
        inputs = turn * torch.logspace(0, 1.5, 16)
        goal = torch.randn(8, 16, generator=generator)
        weight = nn.Parameter(torch.zeros(8, 16))
        optimizer = optimizer_of([weight])
        for number in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - number / 300)
            optimizer.zero_grad()
            ((weight - goal) @ inputs).square().mean().backward()
            optimizer.step()
        return float(((weight.detach() - goal) @ inputs).square().mean())

    adam = error_after(lambda params: torch.optim.Adam(params, lr=0.05, betas=(0.95, 0.95)))
    assert error_after(lambda params: Soap(params, 0.05)) < 0.2 * adam


@pytest.mark.parametrize("shape", [(8, 16), (64, 64)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_what_gradients_hold_nothing_of_hardly_moves(shape: tuple[int, int], size: float) -> None:
    """The same gradient of rank 1 each time: beside it is nothing but noise of rounding."""
    generator = torch.Generator().manual_seed(1)
    gradient = size * torch.outer(*(torch.randn(n, generator=generator) for n in shape))
    optimizer = make(shape, eps=1e-30)
    (weight,) = weights(optimizer)
    before = weight.detach().clone()
    for _ in range(12):
        weight.grad = gradient.clone()
        optimizer.step()
    moved, along = weight.detach() - before, gradient / gradient.norm()
    share = (moved * along).sum()
    assert share < 0
    assert (moved - share * along).norm() < 0.15 * share.abs()


def test_a_saved_state_goes_on_to_the_last_bit() -> None:
    straight = make()
    steps(straight, 0, 25)
    first = make()
    steps(first, 0, 13)
    resumed = make()
    for own, theirs in zip(weights(resumed), weights(first), strict=True):
        own.data.copy_(theirs)
    load_optimizer(resumed, copy.deepcopy(first.state_dict()), Path("x.pth"))
    steps(resumed, 13, 25)
    for own, theirs in zip(weights(resumed), weights(straight), strict=True):
        assert torch.equal(own, theirs)


def test_weights_in_channels_last_have_the_same_steps() -> None:
    plain, last = make((8, 4, 3, 3)), make((8, 4, 3, 3))
    weights(last)[0].data = weights(last)[0].data.contiguous(memory_format=torch.channels_last)
    steps(plain, 0, 12)
    steps(last, 0, 12)
    torch.testing.assert_close(weights(last)[0], weights(plain)[0], atol=1e-5, rtol=0)


def test_weights_of_one_shape_are_moved_as_if_alone() -> None:
    """Also where they part, as one has no gradient, and meet again."""
    shapes = ((4, 4),) * 3
    together = make(*shapes, precondition_frequency=2)
    alone = [make((4, 4), precondition_frequency=2) for _ in shapes]
    for own, single in zip(weights(together), alone, strict=True):
        weights(single)[0].data.copy_(own)
    missing = {(0, 1), (4, 0), (6, 1), (8, 2)}
    for number in range(14):
        together.zero_grad()
        for index, single in enumerate(alone):
            if (number, index) in missing:
                continue
            generator = torch.Generator().manual_seed(10 * number + index)
            gradient = torch.randn(4, 4, generator=generator)
            weights(together)[index].grad = gradient
            weights(single)[0].grad = gradient.clone()
            single.step()
        together.step()
    for own, single in zip(weights(together), alone, strict=True):
        torch.testing.assert_close(own, weights(single)[0], atol=1e-5, rtol=0)


def test_a_state_replaces_the_one_that_is_there() -> None:
    optimizer = make((4, 4), (4, 4), precondition_frequency=2)
    steps(optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    then = [weight.detach().clone() for weight in weights(optimizer)]
    steps(optimizer, 4, 8)
    end = [weight.detach().clone() for weight in weights(optimizer)]
    for weight, value in zip(weights(optimizer), then, strict=True):
        weight.data.copy_(value)
    load_optimizer(optimizer, saved, Path("x.pth"))
    steps(optimizer, 4, 8)
    assert all(map(torch.equal, weights(optimizer), end))


def test_a_copy_goes_on_by_itself() -> None:
    optimizer = make(precondition_frequency=2)
    steps(optimizer, 0, 5)
    other = copy.deepcopy(optimizer)
    steps(other, 5, 9)
    steps(optimizer, 5, 9)
    assert all(map(torch.equal, weights(optimizer), weights(other)))


def test_checkpoints_hold_each_state_once(tmp_path: Path) -> None:
    """After weights that were moved together have parted, too."""
    shapes = ((32, 32),) * 8
    optimizer = make(*shapes)
    sizes = []
    for present in (8, 7, 8):
        steps(optimizer, 0, 2)
        optimizer.zero_grad()
        for weight in weights(optimizer)[:present]:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "x.pth")
        sizes.append((tmp_path / "x.pth").stat().st_size)
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_does_not_end_the_program(value: float) -> None:
    """Who trains sees it in the losses, and says so in words."""
    optimizer = make((3, 4))
    weights(optimizer)[0].grad = torch.full((3, 4), value)
    for _ in range(12):
        optimizer.step()
    assert not weights(optimizer)[0].isfinite().any()


def test_states_of_other_weights_and_optimisers_are_refused() -> None:
    saved = make()
    steps(saved, 0, 1)
    adam = torch.optim.Adam([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])
    for weight in weights(adam):
        weight.grad = torch.ones_like(weight)
    adam.step()
    cases: list[tuple[torch.optim.Optimizer, dict[str, Any], str]] = [
        (make((6, 3, 3, 3), (4, 7), (5,)), saved.state_dict(), "a tensor has another shape"),
        (make(max_precondition_dim=5), saved.state_dict(), "another max_precondition_dim"),
        (make(), adam.state_dict(), "another optimizer"),
        (adam, saved.state_dict(), "another optimizer"),
    ]
    for optimizer, state, message in cases:
        with pytest.raises(UserError, match=message):
            load_optimizer(optimizer, copy.deepcopy(state), Path("x.pth"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": 0}, "`optimizer.args.lr` must be positive"),
        ({"betas": [0.9]}, "takes two numbers"),
        ({"betas": [0.9, 1]}, r"`optimizer.args.betas` must be in \[0, 1\), not 1"),
        ({"shampoo_beta": -0.1}, r"`optimizer.args.shampoo_beta` must be in \[0, 1\)"),
        ({"eps": 0}, "`optimizer.args.eps` must be positive, not 0"),
        ({"precondition_frequency": 0}, "precondition_frequency` must be at least 1"),
        ({"max_precondition_dim": 0}, "max_precondition_dim` must be at least 1"),
        ({"weight_decay": 0}, "unknown key `optimizer.args.weight_decay`"),
    ],
)
def test_wrong_arguments_are_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**args)


def test_weights_without_a_gradient_stay() -> None:
    optimizer = make((2, 2), (3,))
    before: list[Tensor] = [weight.detach().clone() for weight in weights(optimizer)]
    weights(optimizer)[1].grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    assert torch.equal(weights(optimizer)[0], before[0])
    assert not torch.equal(weights(optimizer)[1], before[1])


def test_soap_finds_its_first_eigenvectors_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two thirds of a layer had no gradient, LAPACK's did not converge in float32."""
    asked = []
    eigh = torch.linalg.eigh

    def note(matrix: Tensor) -> object:
        asked.append(matrix.dtype)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", note)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    weight.grad = torch.randn_like(weight) * 1e-5
    weight.grad[:2] = 0
    Soap([weight], lr=1e-3).step()
    assert asked and set(asked) == {torch.float64}
