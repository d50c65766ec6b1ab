"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al., ICLR 2025).

A weight of several axes has gradients G whose axes each have a covariance: with M the matrix that
has axis i as rows and all others as columns, C_i is a running mean of M M^T. Adam then works on G
turned into the eigenvectors of all C_i, where its one rate an element fits best, and the step is
turned back. The eigenvectors follow C_i by one step of orthogonal iteration at a time.

The networks here share layers, and originals learn the picture itself besides its details: badly
conditioned for Adam, which needs more iterations (results/learning).

Weights of the same shape are moved together, in tensors of (N, *shape), N weights: a network has a
hundred weights but some ten shapes, and on a GPU small operations cost what it takes to start them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.optim_args import check_rate, two_betas
from utils.errors import UserError

# Elements of the weights that are moved together on a CPU, whose cache their states have to fit.
_MOST_ON_CPU = 1 << 16
# Times the type's precision times a gradient's norm. With rank 1 in 64 x 64, the same gradient a
# dozen times over: beside it goes 69 times the step along it without, 0.61 of it with 1, 0.07 with
# 10. FSRCNN trained from scratch for 500 iterations is level with 1 to 80; 8000 costs half a dB.
_ROUNDING = 10

_Alike = tuple[nn.Parameter, ...]
_State = dict[str, Tensor]


class Soap(torch.optim.Optimizer):
    """See the module. Weights of one axis (biases) have Adam's steps.

    The first gradient serves to find the first eigenvectors; it moves nothing.

    A convolution's axes are its output channels, its input channels (of a group) and its taps. The
    state of a CARN takes 7 times the memory of its weights, where Adam's takes 2.

    Where an axis is longer than all others together, some of its first eigenvectors are arbitrary:
    rounding decides. Processes that train together must compute alike, on the same hardware with
    the same libraries, as nothing but their gradients is made equal. To the root of the squares is
    added, beside `eps`, what rounding can make of a gradient's norm: elements that hold nothing
    else hardly move.

    Args:
        params: what to train.
        lr: rate; good ones are two to four times those of the configs for Adam.
        betas: decays of the gradients' mean and of their squares' mean.
        shampoo_beta: decay of the covariances.
        eps: added to the root of the squares.
        precondition_frequency: steps from one change of the eigenvectors to the next.
        max_precondition_dim: longer axes are not turned.

    Raises:
        UserError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: Sequence[float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 1024,
    ) -> None:
        check_rate(lr)
        first, second = two_betas(betas)
        for name, beta in (("betas", first), ("betas", second), ("shampoo_beta", shampoo_beta)):
            if not 0 <= beta < 1:
                raise UserError(f"config: `optimizer.args.{name}` must be in [0, 1), not {beta}")
        if not eps > 0:
            raise UserError(f"config: `optimizer.args.eps` must be positive, not {eps}")
        for name, value in (
            ("precondition_frequency", precondition_frequency),
            ("max_precondition_dim", max_precondition_dim),
        ):
            if value < 1:
                raise UserError(f"config: `optimizer.args.{name}` must be at least 1, not {value}")
        defaults = {
            "lr": lr,
            "betas": (first, second),
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "precondition_frequency": precondition_frequency,
            "max_precondition_dim": max_precondition_dim,
        }
        self._stacks: dict[_Alike, _State] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After loading and copying: states are no views into `_stacks` any more."""
        super().__setstate__(state)
        self._stacks = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            for weights in self._alike(group["params"]):
                gradients = torch.stack([_seen(weight.grad) for weight in weights])
                if not self.state[weights[0]]:
                    # A gradient lies in its own eigenvectors: beside them is nothing but noise of
                    # rounding, which Adam would turn into steps of full size.
                    self._share(weights, _first_state(gradients, group))
                    continue
                stack = self._stacks.get(weights) or self._gathered(weights)
                steps = _steps(stack, gradients, group).unbind()
                torch._foreach_sub_(
                    list(weights),
                    [
                        step.reshape(weight.shape)
                        for step, weight in zip(steps, weights, strict=True)
                    ],
                )

    def misfit(self, weight: Tensor, state: Mapping[str, Any]) -> str | None:
        """Why `state`, loaded from a checkpoint, cannot be that of `weight`; None if it can be."""
        shape = tuple(_seen(weight).shape)
        wanted = {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        for axis in _turned(shape, self.defaults["max_precondition_dim"]):
            wanted |= dict.fromkeys((_covariance(axis), _basis(axis)), (shape[axis], shape[axis]))
        if set(state) != set(wanted):
            return "it is of another optimizer, or of another max_precondition_dim"
        fits = all(tuple(state[key].shape) == size for key, size in wanted.items())
        return None if fits else "a tensor has another shape"

    def _alike(self, weights: Iterable[nn.Parameter]) -> list[_Alike]:
        """Those with a gradient, by shape and the number of steps that they have had."""
        found: dict[Any, list[nn.Parameter]] = {}
        for weight in weights:
            if weight.grad is not None:
                state = self.state[weight]
                count = int(state["step"]) if state else -1
                key = (weight.shape, weight.device, weight.dtype, count)
                found.setdefault(key, []).append(weight)
        return [part for alike in found.values() for part in _parts(alike)]

    # States: of each weight a view into that of all alike

    def _gathered(self, weights: _Alike) -> _State:
        """What the weights have had so far, together."""
        states = [self.state[weight] for weight in weights]
        stack = {key: torch.stack([state[key] for state in states]) for key in states[0]}
        self._share(weights, stack)
        return stack

    def _share(self, weights: _Alike, stack: _State) -> None:
        for index, weight in enumerate(weights):
            self.state[weight] = {key: value[index] for key, value in stack.items()}
        for others in [key for key in self._stacks if not set(key).isdisjoint(weights)]:
            del self._stacks[others]
            # Views would keep all of the stack.
            for weight in set(others).difference(weights):
                self.state[weight] = {k: v.clone() for k, v in self.state[weight].items()}
        self._stacks[weights] = stack


# Tensors of N weights: gradients (N, *shape), and states


def _first_state(gradients: Tensor, group: Mapping[str, Any]) -> _State:
    # On the CPU, as in torch's optimisers: no GPU is waited for to know it.
    state = {"step": torch.zeros(len(gradients))}
    state |= {key: torch.zeros_like(gradients) for key in ("exp_avg", "exp_avg_sq")}
    for axis in _turned(gradients.shape[1:], group["max_precondition_dim"]):
        covariances = _outer(gradients, axis) * (1 - group["shampoo_beta"])
        # A gradient that is not finite is the caller's to report; eigh would raise. It is a
        # function of CPUs and CUDA alone, and in float32 does not converge on all covariances.
        finite = torch.nan_to_num(covariances, posinf=0.0, neginf=0.0).cpu().double()
        bases = torch.linalg.eigh(finite)[1].to(gradients)
        state |= {_covariance(axis): covariances, _basis(axis): bases.contiguous()}
    return state


def _steps(state: _State, gradients: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What to take from the weights; brings `state` up to `gradients`."""
    state["step"] += 1
    count = int(state["step"][0])
    bases = [state.get(_basis(axis)) for axis in range(gradients.dim() - 1)]
    beta1, beta2 = group["betas"]
    means = state["exp_avg"].lerp_(gradients, 1 - beta1)
    squares = state["exp_avg_sq"].lerp_(_turn(gradients, bases).square(), 1 - beta2)
    roots = (squares / (1 - beta2**count)).sqrt_()
    roots += group["eps"] + _rounding(roots, bases)
    steps = _turn(_turn(means, bases) / roots, bases, back=True)
    _follow(state, gradients, group, is_due=count % group["precondition_frequency"] == 0)
    return steps * (group["lr"] / (1 - beta1**count))


def _rounding(roots: Tensor, bases: Sequence[Tensor | None]) -> Tensor | float:
    """A bound of what rounding leaves in elements of turned gradients that are zero: (N, 1, ...).

    Adam moves every element by the rate, however small its gradients are: where these are of less
    than full rank, it would move by noise of rounding, at once and in all directions.
    """
    if not any(basis is not None for basis in bases):
        return 0.0
    norms = torch.linalg.vector_norm(roots, dim=tuple(range(1, roots.dim())), keepdim=True)
    return norms * (_ROUNDING * torch.finfo(roots.dtype).eps)


def _follow(state: _State, gradients: Tensor, group: Mapping[str, Any], *, is_due: bool) -> None:
    """Bring covariances and, when it is time, eigenvectors up to `gradients`."""
    for axis in _turned(gradients.shape[1:], group["max_precondition_dim"]):
        covariances = state[_covariance(axis)]
        covariances.lerp_(_outer(gradients, axis), 1 - group["shampoo_beta"])
        if not is_due:
            continue
        bases = state[_basis(axis)]
        images = covariances @ bases
        # QR keeps the order of columns: the largest first, or small ones spoil them.
        order = (bases * images).sum(1).argsort(descending=True)
        images = images.gather(2, order.unsqueeze(1).expand_as(images))
        bases.copy_(torch.linalg.qr(images)[0])
        squares = state["exp_avg_sq"]
        squares.copy_(_ordered(squares, axis, order))


def _turned(shape: Sequence[int], most: int) -> list[int]:
    """The axes that have eigenvectors."""
    if len(shape) == 1:
        return []
    return [axis for axis, size in enumerate(shape) if 1 < size <= most]


def _covariance(axis: int) -> str:
    return f"covariance_{axis}"


def _basis(axis: int) -> str:
    return f"basis_{axis}"


def _seen(weight: Tensor | None) -> Tensor:
    """A weight, or its gradient, by the axes it is seen in: taps of a convolution are one."""
    assert weight is not None
    return weight.flatten(2) if weight.dim() > 2 else weight


def _parts(alike: list[nn.Parameter]) -> Iterator[_Alike]:
    """Those that are moved together."""
    first = alike[0]
    most = len(alike)
    if first.device.type == "cpu":
        most = max(1, _MOST_ON_CPU // max(1, first.numel()))
    for start in range(0, len(alike), most):
        yield tuple(alike[start : start + most])


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
