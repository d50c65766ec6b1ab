"""Losses, gradients and weights that are not finite: what is said, and how much is put up with."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from engine.state import TrainState
from utils.distributed import fail_together
from utils.errors import UserError

logger = logging.getLogger(__name__)


def first_not_finite(values: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            return name
    return None


class Divergence:
    """Ends a run that diverges, after as many updates left out as are allowed.

    Args:
        state: what is trained.
        allowed: updates in a row that may be left out.
        seed: of the run; with it and an iteration's number, the batch can be had again.
        last: the newest checkpoint, there or not.
    """

    def __init__(self, state: TrainState, *, allowed: int, seed: int, last: Path) -> None:
        self._state = state
        self._allowed = allowed
        self._seed = seed
        self._last = last

    def leave_out(self, what: str, done: int) -> None:
        """Do without the update of iteration `done`; to be called on all ranks.

        Raises:
            UserError: there were as many in a row before as are allowed.
        """
        if self._state.skipped >= self._allowed:
            fail_together(self._message(what, done))
        self._state.skipped += 1
        logger.warning(
            "iteration %d (seed %d): %s is not finite; its update is left out, %d in a row of %d "
            "that `nan_skip` allows",
            done,
            self._seed,
            what,
            self._state.skipped,
            self._allowed,
        )

    def check_weights(self, done: int) -> None:
        """Refuse weights that are no use to anyone, before they replace better ones.

        Raises:
            UserError: one of them is not finite.
        """
        bad = first_not_finite(self._state.model.state_dict())
        if bad is not None:
            raise UserError(self._message(bad, done))

    def _message(self, what: str, done: int) -> str:
        kept = "no checkpoint was written yet"
        if self._last.is_file():
            kept = f"the last good checkpoint is kept, {self._last}"
        return (
            f"training diverged: {what} is not finite at iteration {done} (seed {self._seed}); "
            f"{kept}: lower `optimizer.args.lr` and run again"
        )
