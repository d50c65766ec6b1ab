"""When a run's checkpoints are written, and what they hold."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.checkpoints import Checkpoints
from engine.divergence import Divergence
from engine.state import TrainState
from utils.distributed import World, together

# The sums of losses since the last line of the log, which a resumed run goes on with.
Means = Callable[[], Mapping[str, Any]]


class Saver:
    """Writes what a run has come to: rank 0 does, all ranks call it.

    Args:
        world: the processes.
        state: what is trained.
        checkpoints: in the run's folder.
        divergence: looks at the weights before they replace others.
        saved_iteration: that the newest checkpoint holds already; None where there is none.
    """

    def __init__(
        self,
        world: World,
        state: TrainState,
        checkpoints: Checkpoints,
        divergence: Divergence,
        saved_iteration: int | None,
    ) -> None:
        self._world = world
        self._state = state
        self._checkpoints = checkpoints
        self._divergence = divergence
        self._saved_iteration = saved_iteration
        self._saved_at = time.monotonic()

    def start_clock(self) -> None:
        """Count the time from now on, as if all were saved."""
        self._saved_at = time.monotonic()

    def is_overdue(self, limit_s: float | None) -> bool:
        """Whether `limit_s` have passed since the last checkpoint, by this rank's clock."""
        return limit_s is not None and time.monotonic() - self._saved_at >= limit_s

    def save(self, done: int, means: Means) -> None:
        """Write the newest checkpoint, unless it holds iteration `done` already.

        Raises:
            UserError: weights that are not finite, or a file that cannot be written.
        """
        if done == self._saved_iteration:
            return
        self._saved_iteration = done

        def write() -> None:
            self._divergence.check_weights(done)
            self._checkpoints.save(self._content(done, means))

        together(lambda: write() if self._world.is_main else None)
        self._saved_at = time.monotonic()

    def save_if_best(self, done: int, psnr: float, means: Means) -> None:
        """Write the best checkpoint, if `psnr` is above that of the best one so far.

        Raises:
            UserError: it cannot be written.
        """

        def write() -> None:
            self._checkpoints.save_if_best(self._content(done, means), psnr)

        together(lambda: write() if self._world.is_main else None)

    def _content(self, done: int, means: Means) -> dict[str, Any]:
        return {**self._state.content(done), "means": means()}
