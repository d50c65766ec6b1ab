"""An average of the weights over the iterations: smoother than the weights themselves."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.errors import UserError


class Ema:
    """Exponential moving average of what training changes in a model.

    Averaged are the parameters that are trained, and all floating-point buffers (statistics of
    batch norm). Whole numbers and frozen parameters are the model's own.

    Args:
        model: its tensors must stay where they are (training in place, as optimisers do).
        decay: share of the average that an iteration leaves. The first iterations count for more:
            after n of them the decay is at most (1 + n) / (10 + n), else the initial weights would
            be seen for the first 1 / (1 - decay).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        self._live = {
            name: value
            for name, value in model.state_dict().items()
            if value.is_floating_point() and name not in frozen
        }
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin at the model's present weights."""
        self._average = {name: value.clone() for name, value in self._live.items()}

    def update(self, done: int) -> None:
        """Take in the model's present weights, those after `done` iterations."""
        decay = min(self.decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), list(self._live.values()), done)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages while this is entered, and its own weights again after."""
        own = {name: value.clone() for name, value in self._live.items()}
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(own)

    @contextlib.contextmanager
    def jumping(self) -> Iterator[None]:
        """Of each weight that changes while this is entered, the average is the new value.

        Where the weights' network stays as it was by that, the averages' may not.
        """
        before = {name: value.clone() for name, value in self._live.items()}
        yield
        for name, value in self._live.items():
            average = self._average[name]
            average.copy_(torch.where(value.detach() != before[name], value.detach(), average))

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._live[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by the names that they have in the model's state dict."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor], source: Path) -> None:
        """Take over saved averages.

        Raises:
            UserError: they are not those of this model.
        """
        shapes = {name: value.shape for name, value in self._average.items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise UserError(
                f"checkpoint {source}: its averaged weights (`ema`) do not fit the config; start "
                f"anew with --resume never"
            )
        for name, value in state.items():
            self._average[name].copy_(value)
