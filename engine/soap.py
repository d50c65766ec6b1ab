"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., ICLR 2025).

A weight of several axes has gradients G whose axes each have a covariance: with M the matrix that
has axis i as rows and all others as columns, C_i is a running mean of M M^T. Adam then works on G
turned into the eigenvectors of all C_i, where its one rate an element fits best, and the step is
turned back. The eigenvectors follow C_i by one step of orthogonal iteration at a time.

The networks here share layers, and originals learn the picture itself besides its details: badly
conditioned for Adam, which needs many times the iterations.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Soap(torch.optim.Optimizer):
    """See the module. Weights of one axis (biases) have Adam's steps.

    The first gradient serves to find the first eigenvectors; it moves nothing.

    A convolution's axes are its output channels, its input channels (of a group) and its taps; the
    state of a 3x3 convolution of 64 channels takes 2.5 times the memory of the weights.

    Args:
        params: what to train.
        lr: rate; good ones are three to four times as large as Adam's.
        betas: decays of the gradients' mean and of their squares' mean.
        shampoo_beta: decay of the covariances.
        eps: added to the root of the squares.
        precondition_frequency: steps from one change of the eigenvectors to the next.
        max_precondition_dim: longer axes are not turned.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 1024,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})
        self._shampoo_beta = shampoo_beta
        self._eps = eps
        self._frequency = precondition_frequency
        self._max_dim = max_precondition_dim

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group["lr"], group["betas"])

    def fits(self, weight: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether `state`, loaded from a checkpoint, can be that of `weight`."""
        shape = _axes(weight)
        wanted = {"exp_avg": shape, "exp_avg_sq": shape}
        for axis in self._turned(shape):
            square = (shape[axis], shape[axis])
            wanted |= {_covariance(axis): square, _basis(axis): square}
        found = {key: tuple(value.shape) for key, value in state.items() if key != "step"}
        return found == wanted and int(state["step"]) >= 0

    def _turned(self, shape: Sequence[int]) -> list[int]:
        """The axes that have eigenvectors."""
        if len(shape) == 1:
            return []
        return [axis for axis, size in enumerate(shape) if 1 < size <= self._max_dim]

    def _move(self, weight: Tensor, lr: float, betas: tuple[float, float]) -> None:
        shape = _axes(weight)
        gradient = weight.grad.reshape(shape)  # type: ignore[union-attr]
        state = self.state[weight]
        if not state:
            # It lies in its own eigenvectors: beside them is nothing but noise of rounding, which
            # Adam would turn into steps of full size.
            self._begin(state, gradient)
            return
        state["step"] += 1
        bases = [state.get(_basis(axis)) for axis in range(len(shape))]
        beta1, beta2 = betas
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        squares = state["exp_avg_sq"].lerp_(_turn(gradient, bases).square_(), 1 - beta2)
        count = int(state["step"])
        root = (squares / (1 - beta2**count)).sqrt_().add_(self._eps)
        step = _turn(mean, bases).div_(root)
        rate = lr / (1 - beta1**count)
        weight.add_(_turn(step, bases, back=True).reshape(weight.shape), alpha=-rate)
        self._follow(state, gradient)

    def _begin(self, state: dict[str, Any], gradient: Tensor) -> None:
        # A tensor: checkpoints of torch's optimisers have one, too.
        state["step"] = torch.zeros((), device="cpu")
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
        for axis in self._turned(gradient.shape):
            # A gradient that is not finite is the caller's to report; eigh would raise.
            covariance = torch.nan_to_num(_outer(gradient, axis), posinf=0.0, neginf=0.0)
            state[_covariance(axis)] = covariance
            state[_basis(axis)] = torch.linalg.eigh(covariance)[1].flip(-1)

    def _follow(self, state: dict[str, Any], gradient: Tensor) -> None:
        """Bring covariances and, when it is time, eigenvectors up to `gradient`."""
        due = int(state["step"]) % self._frequency == 0
        for axis in self._turned(gradient.shape):
            covariance = state[_covariance(axis)]
            covariance.lerp_(_outer(gradient, axis), 1 - self._shampoo_beta)
            if not due:
                continue
            basis = state[_basis(axis)]
            image = covariance @ basis
            # QR keeps the order of columns: the largest first, or small ones spoil them.
            order = (basis * image).sum(0).argsort(descending=True)
            state[_basis(axis)] = torch.linalg.qr(image.index_select(1, order))[0]
            state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)


def _covariance(axis: int) -> str:
    return f"covariance_{axis}"


def _basis(axis: int) -> str:
    return f"basis_{axis}"


def _axes(weight: Tensor) -> tuple[int, ...]:
    """The shape that a weight is seen in: taps of a convolution are one axis."""
    if weight.dim() == 4:
        return (weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3])
    return tuple(weight.shape)


def _outer(gradient: Tensor, axis: int) -> Tensor:
    """Covariance of an axis of size n in one gradient: (n, n)."""
    rows = gradient.movedim(axis, 0).reshape(gradient.shape[axis], -1)
    return rows @ rows.mT


def _turn(x: Tensor, bases: Sequence[Tensor | None], *, back: bool = False) -> Tensor:
    """`x` in the coordinates of the bases of its axes, or back from them. Always a new tensor."""
    for basis in bases:
        # The first axis is taken away, and comes last: after all of them, the order is as before.
        if basis is None:
            x = x.movedim(0, -1)
        else:
            x = torch.tensordot(x, basis, ([0], [1 if back else 0]))
    return x.clone() if all(basis is None for basis in bases) else x
