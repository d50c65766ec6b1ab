"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., ICLR 2025).

A weight of several axes has gradients G whose axes each have a covariance: with M the matrix that
has axis i as rows and all others as columns, C_i is a running mean of M M^T. Adam then works on G
turned into the eigenvectors of all C_i, where its one rate an element fits best, and the step is
turned back. The eigenvectors follow C_i by one step of orthogonal iteration at a time.

The networks here share layers, and originals learn the picture itself besides its details: badly
conditioned for Adam, which needs many times the iterations.

Weights of the same shape are moved together, in tensors of (N, *shape), N weights: a network has a
hundred weights but some ten shapes, and on a GPU small operations cost what it takes to start them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Elements of the weights that are moved together on a CPU, whose cache their states have to fit.
_MOST_ON_CPU = 1 << 16


class Soap(torch.optim.Optimizer):
    """See the module. Weights of one axis (biases) have Adam's steps.

    The first gradient serves to find the first eigenvectors; it moves nothing.

    A convolution's axes are its output channels, its input channels (of a group) and its taps; the
    state of a 3x3 convolution of 64 channels takes 2.5 times the memory of the weights.

    Args:
        params: what to train.
        lr: rate; good ones are two to four times as large as Adam's.
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
        self._stacks: dict[tuple[nn.Parameter, ...], dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            for weights in self._alike(group["params"]):
                gradients = torch.stack([_seen(weight.grad) for weight in weights])
                stack = self._stacks.get(weights) or self._gathered(weights)
                if stack is None:
                    # A gradient lies in its own eigenvectors: beside them is nothing but noise of
                    # rounding, which Adam would turn into steps of full size.
                    self._begin(weights, gradients)
                    continue
                steps = self._steps(stack, gradients, group["lr"], group["betas"])
                for weight, step in zip(weights, steps, strict=True):
                    weight.sub_(step.reshape(weight.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        self._stacks.clear()

    def fits(self, weight: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether `state`, loaded from a checkpoint, can be that of `weight`."""
        shape = tuple(_seen(weight).shape)
        wanted = {"exp_avg": shape, "exp_avg_sq": shape}
        for axis in self._turned(shape):
            square = (shape[axis], shape[axis])
            wanted |= {_covariance(axis): square, _basis(axis): square}
        found = {key: tuple(value.shape) for key, value in state.items() if key != "step"}
        return found == wanted and int(state["step"]) >= 0

    def _alike(self, weights: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, ...]]:
        """Those with a gradient, by shape and the number of steps that they have had."""
        found: dict[Any, list[nn.Parameter]] = {}
        for weight in weights:
            if weight.grad is not None:
                count = int(self.state[weight]["step"]) if self.state[weight] else -1
                key = (_seen(weight).shape, weight.device, weight.dtype, count)
                found.setdefault(key, []).append(weight)
        return [part for alike in found.values() for part in _parts(alike)]

    def _turned(self, shape: Sequence[int]) -> list[int]:
        """The axes that have eigenvectors."""
        if len(shape) == 1:
            return []
        return [axis for axis, size in enumerate(shape) if 1 < size <= self._max_dim]

    # States: of each weight a view into that of all alike

    def _gathered(self, weights: tuple[nn.Parameter, ...]) -> dict[str, Tensor] | None:
        """What the weights have had so far, together; None before the first gradient."""
        states = [self.state[weight] for weight in weights]
        if not states[0]:
            return None
        return self._share(weights, {k: torch.stack([s[k] for s in states]) for k in states[0]})

    def _begin(self, weights: tuple[nn.Parameter, ...], gradients: Tensor) -> None:
        # On the CPU, as in torch's optimisers: no GPU is waited for to know it.
        stack = {"step": torch.zeros(len(weights))}
        stack |= {key: torch.zeros_like(gradients) for key in ("exp_avg", "exp_avg_sq")}
        for axis in self._turned(gradients.shape[1:]):
            # A gradient that is not finite is the caller's to report; eigh would raise.
            covariances = torch.nan_to_num(_outer(gradients, axis), posinf=0.0, neginf=0.0)
            stack[_covariance(axis)] = covariances
            stack[_basis(axis)] = torch.linalg.eigh(covariances)[1].flip(-1).contiguous()
        self._share(weights, stack)

    def _share(
        self, weights: tuple[nn.Parameter, ...], stack: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for index, weight in enumerate(weights):
            self.state[weight] = {key: value[index] for key, value in stack.items()}
        # Of any others with the same weights, the states are no views any more.
        stale = [key for key in self._stacks if not set(key).isdisjoint(weights)]
        for key in stale:
            del self._stacks[key]
        self._stacks[weights] = stack
        return stack

    # The formula

    def _steps(
        self, stack: dict[str, Tensor], gradients: Tensor, lr: float, betas: tuple[float, float]
    ) -> Tensor:
        """What to take from the weights; brings `stack` up to `gradients`."""
        stack["step"] += 1
        count = int(stack["step"][0])
        bases = [stack.get(_basis(axis)) for axis in range(gradients.dim() - 1)]
        beta1, beta2 = betas
        means = stack["exp_avg"].lerp_(gradients, 1 - beta1)
        squares = stack["exp_avg_sq"].lerp_(_turn(gradients, bases).square(), 1 - beta2)
        roots = (squares / (1 - beta2**count)).sqrt_().add_(self._eps)
        steps = _turn(_turn(means, bases) / roots, bases, back=True)
        self._follow(stack, gradients, is_due=count % self._frequency == 0)
        return steps * (lr / (1 - beta1**count))

    def _follow(self, stack: dict[str, Tensor], gradients: Tensor, *, is_due: bool) -> None:
        """Bring covariances and, when it is time, eigenvectors up to `gradients`."""
        for axis in self._turned(gradients.shape[1:]):
            covariances = stack[_covariance(axis)]
            covariances.lerp_(_outer(gradients, axis), 1 - self._shampoo_beta)
            if is_due:
                bases = stack[_basis(axis)]
                images = covariances @ bases
                # QR keeps the order of columns: the largest first, or small ones spoil them.
                order = (bases * images).sum(1).argsort(descending=True)
                sorted_images = images.gather(2, order.unsqueeze(1).expand_as(images))
                bases.copy_(torch.linalg.qr(sorted_images)[0])
                squares = stack["exp_avg_sq"]
                squares.copy_(_ordered(squares, axis, order))


def _parts(alike: list[nn.Parameter]) -> Iterator[tuple[nn.Parameter, ...]]:
    first = alike[0]
    most = max(1, _MOST_ON_CPU // first.numel()) if first.device.type == "cpu" else len(alike)
    for start in range(0, len(alike), most):
        yield tuple(alike[start : start + most])


def _covariance(axis: int) -> str:
    return f"covariance_{axis}"


def _basis(axis: int) -> str:
    return f"basis_{axis}"


def _seen(weight: Tensor | None) -> Tensor:
    """A weight, or its gradient, by the axes it is seen in: taps of a convolution are one."""
    assert weight is not None
    return weight.flatten(2) if weight.dim() > 2 else weight


def _outer(x: Tensor, axis: int) -> Tensor:
    """Covariances of an axis of size n in each of N tensors: (N, n, n)."""
    rows = x.movedim(axis + 1, 1).flatten(2)
    return rows @ rows.mT


def _ordered(x: Tensor, axis: int, order: Tensor) -> Tensor:
    """N tensors with an axis of size n sorted anew by `order` (N, n)."""
    shape = [1] * x.dim()
    shape[0], shape[axis + 1] = order.shape
    return x.gather(axis + 1, order.reshape(shape).expand_as(x))


def _turn(x: Tensor, bases: Sequence[Tensor | None], *, back: bool = False) -> Tensor:
    """N tensors in the coordinates of the bases (N, n, n) of their axes, or back from them."""
    for basis in bases:
        # The first axis is turned and put last: after all of them, the order is as before.
        if basis is not None:
            matrix = basis if back else basis.mT
            x = (matrix @ x.flatten(2)).reshape(x.shape)
        x = x.movedim(1, -1)
    return x
