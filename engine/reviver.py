"""Dead ReLU units of a network in training: new weights for them, and a hint at the end."""

import logging

from torch import nn

from engine.data import TrainBatches
from engine.gradients import BatchGradients
from engine.state import TrainState
from engine.unit_probe import HINT_PATCHES, PATCHES, Probe, told
from utils.distributed import max_over_ranks, together
from utils.errors import UserError

logger = logging.getLogger(__name__)


class Reviver:
    """Looks for the dead units of what is trained; all ranks call it.

    Args:
        model: what is trained.
        state: its.
        samples: of the run, which are read again.
        gradients: knows how the threads are shared out.
        batch_size: over all ranks.
        seed: of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainState,
        samples: TrainBatches,
        gradients: BatchGradients,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self._model = model
        self._state = state
        self._samples = samples
        self._gradients = gradients
        self._batch_size = batch_size
        self._seed = seed

    def revive(self, step: int) -> None:
        """Give new weights to the units that are dead on the samples from iteration `step` on.

        Raises:
            UserError: the samples cannot be read.
        """
        probe = together(lambda: self._probe(step, step + self._batches(PATCHES)))
        with self._gradients.all_threads(), self._state.jumping():
            found = probe.revive(self._seed + step)
        logger.info("iteration %d: new weights for dead units: %s", step, told(found))

    def tell(self, end: int) -> None:
        """Say which units are dead on the samples before iteration `end`.

        A hint, which nothing hangs on: where samples cannot be read again there is none.
        """
        try:
            probe = self._probe(max(0, end - self._batches(HINT_PATCHES)), end)
        except UserError:
            probe = None
        if max_over_ranks([probe is None])[0]:
            return
        assert probe is not None
        with self._gradients.all_threads():
            found = probe.dead_units()
        if any(units.any() for units in found.values()):
            logger.info("dead units, see `revive` in the README: %s", told(found))

    def _probe(self, start: int, stop: int) -> Probe:
        return Probe(self._model, self._samples.of(start, stop), trained_only=True)

    def _batches(self, patches: int) -> int:
        return -(-patches // self._batch_size)
