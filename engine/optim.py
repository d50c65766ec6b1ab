"""Optimisers and learning-rate schedules by their config names."""

import bisect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.optim_args import check_rate, two_betas
from engine.soap import Soap
from utils.device import FUSED_DEVICES
from utils.errors import UserError
from utils.registry import Registry

_log = logging.getLogger(__name__)

OPTIMIZERS = Registry("optimizer")
SCHEDULERS = Registry("lr_scheduler")


@OPTIMIZERS.register("adam")
def make_adam(
    *,
    params: Iterable[nn.Parameter],
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> torch.optim.Adam:
    """Adam; the arguments are torch's.

    Where neither `foreach` nor `fused` is given, it is fused on devices that have it so: on one
    core of a CPU, the 166 thousand weights of a CARN then take 0.34 ms, not 1.46 (foreach: 0.93).
    """
    check_rate(lr)
    params = list(params)
    if fused is None and foreach is None:
        fused = all(p.device.type in FUSED_DEVICES for p in params)
    return torch.optim.Adam(
        params,
        lr=lr,
        betas=two_betas(betas),
        weight_decay=weight_decay,
        eps=eps,
        foreach=foreach,
        fused=fused,
    )


OPTIMIZERS.register("soap")(Soap)


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], source: Path
) -> None:
    """Load the state of every parameter; hyper-parameters stay those that `optimizer` has.

    So a rate that was changed in the config before resuming is in effect.

    Raises:
        UserError: a state that does not fit.
    """
    own = optimizer.state_dict()["param_groups"]
    try:
        counts = [
            [len(group["params"]) for group in groups] for groups in (own, saved["param_groups"])
        ]
        if counts[0] != counts[1]:
            raise ValueError(f"it holds {sum(counts[1])} tensors, the model has {sum(counts[0])}")
        optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        for parameter, state in optimizer.state.items():
            check = optimizer.misfit if isinstance(optimizer, Soap) else _misfit
            if (problem := check(parameter, state)) is not None:
                raise ValueError(problem)
            _lay_out(parameter, state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {source}: the state of its optimizer does not fit the config ({error}); "
            f"start anew with --resume never"
        ) from error


def _misfit(parameter: Tensor, state: Mapping[str, Any]) -> str | None:
    """Why `state` cannot be that of `parameter` in Adam; None if it can be."""
    if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
        return "it is of another optimizer"
    if any(v.dim() and v.shape != parameter.shape for v in state.values()):
        return "a tensor has another shape"
    return None


def _lay_out(parameter: Tensor, state: dict[str, Any]) -> None:
    """Give tensors of a parameter's shape its order of memory, whichever they were saved in.

    Fused optimisers go through memory, not through elements.
    """
    for key, value in state.items():
        if value.shape == parameter.shape:
            state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@SCHEDULERS.register("CosineAnnealingLR_Restart")
class CosineRestart:
    """Cosine annealing with restarts.

    With last restart r, its period T and weight w, step t has the rate
    ``eta_min + (w lr0 - eta_min) (1 + cos(pi (t - r) / T)) / 2``; a restart happens at
    ``t = restarts[i] + 1``. The rate is a function of t alone, so resuming needs only t.

    Args:
        optimizer: whose groups' rates are set; their rates at construction are lr0.
        T_period: periods: the first, then one per restart. Where the list is shorter than the
            restarts, its last entry goes on.
        restarts: steps after which a restart happens, ascending.
        weights: one factor per restart.
        eta_min: the lowest rate.
    """

    def __init__(
        self,
        *,
        optimizer: torch.optim.Optimizer,
        T_period: Sequence[int],
        restarts: Sequence[int] = (),
        weights: Sequence[float] = (),
        eta_min: float = 0.0,
    ) -> None:
        if not T_period or min(T_period) < 1 or sorted(restarts) != list(restarts):
            raise UserError(
                "config: `lr_scheduler.args`: T_period takes positive iterations, restarts ascend"
            )
        if len(T_period) > len(restarts) + 1:
            raise UserError(
                f"config: `lr_scheduler.args`: `T_period` has {len(T_period)} entries and "
                f"`restarts` {len(restarts)}: at most one period more than restarts"
            )
        if len(weights) != len(restarts):
            raise UserError(
                f"config: `lr_scheduler.args`: `restarts` has {len(restarts)} entries and "
                f"`weights` {len(weights)}: one weight per restart"
            )
        if not eta_min >= 0:
            raise UserError(
                f"config: `lr_scheduler.args.eta_min` must be 0 or more, not {eta_min:g}"
            )
        lowest = min(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        if eta_min > lowest:
            _log.warning(
                "`lr_scheduler.args.eta_min`, %g, is above the optimizer's lr, %g: the learning "
                "rate rises",
                eta_min,
                lowest,
            )
        if not all(weight > 0 for weight in weights):
            raise UserError(
                f"config: `lr_scheduler.args.weights` must be above 0, not {list(weights)}"
            )
        self.optimizer = optimizer
        self.periods = list(T_period)
        self.restarts = [r + 1 for r in restarts]
        self.weights = list(weights)
        self.eta_min = eta_min
        self.step_count = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.set_step(0)

    def rate(self, lr0: float, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        done = bisect.bisect_right(self.restarts, step)
        start = self.restarts[done - 1] if done else 0
        weight = self.weights[done - 1] if done else 1.0
        period = self.periods[min(done, len(self.periods) - 1)]
        cosine = (1 + math.cos(math.pi * (step - start) / period)) / 2
        return self.eta_min + (weight * lr0 - self.eta_min) * cosine

    def set_step(self, step: int) -> None:
        """Set every group's rate to that of `step`."""
        self.step_count = step
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(group["initial_lr"], step)

    def state_dict(self) -> dict[str, Any]:
        """The step; everything else is the spec's."""
        return {"step": self.step_count}


class WarmUp:
    """A schedule that begins with small rates: its own, times (t + 1) / iterations at step t.

    Still a function of the step alone.

    Args:
        schedule: gives the rates that this one scales.
        iterations: from this one on, the rates are those of `schedule`.
    """

    def __init__(self, schedule: CosineRestart, iterations: int) -> None:
        self._schedule = schedule
        self._iterations = iterations
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Set every group's rate to that of `step`."""
        self._schedule.set_step(step)
        share = min(1.0, (step + 1) / self._iterations)
        for group in self._schedule.optimizer.param_groups:
            group["lr"] *= share

    def state_dict(self) -> dict[str, Any]:
        """That of the schedule."""
        return self._schedule.state_dict()
