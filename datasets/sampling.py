"""Which image, which crop, which scale: functions of (seed, position, iteration) alone.

A run is a sequence of global positions 0, 1, 2, ...; iteration t takes the `batch_size` positions
from t * batch_size on, over all ranks. Everything random about a sample follows from the seed and
its position (its crop, its flips), its epoch (which image) or its iteration (the scale, which the
whole batch shares). So neither the number of workers, nor that of ranks, nor an interruption
changes what is seen, and nothing has to be saved to resume.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from utils.errors import UserError

# Keep the random streams of one seed apart.
_PERMUTATION, _SCALE, SAMPLE_STREAM = range(3)


class SampleKey(NamedTuple):
    """What a wrapper needs to make one random sample; plain integers, so it goes to any worker."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    position: int
    iteration: int
    seed: int

    def generator(self) -> np.random.Generator:
        """The random numbers of this sample: crop and flips."""
        return np.random.default_rng([self.seed, SAMPLE_STREAM, self.position])

    def scale(self, lowest: float, highest: float) -> float:
        """The scale of this iteration, uniform in [lowest, highest]: the same in a whole batch."""
        if lowest == highest:
            return lowest
        return float(
            np.random.default_rng([self.seed, _SCALE, self.iteration]).uniform(lowest, highest)
        )


class IterationBatchSampler(Sampler[list[SampleKey]]):
    """A batch sampler for `DataLoader(batch_sampler=...)`: one list of keys per iteration.

    Images come in an order that is shuffled anew in each epoch; a batch may span two epochs.

    Args:
        length: number of samples in the data set.
        batch_size: total over all ranks.
        seed: any integer from 0 on.
        start: first iteration to yield; to resume, the number of iterations done.
        stop: where to end: the last iteration is stop - 1.
        rank: this process; gets the rank-th of `world_size` equal parts of each batch.
        world_size: number of processes.

    Raises:
        UserError: an empty data set, or a batch that does not divide evenly over the ranks.
    """

    def __init__(
        self,
        *,
        length: int,
        batch_size: int,
        seed: int,
        start: int = 0,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise UserError("the training data set is empty")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch_size {batch_size} is the total over all processes and must be a multiple "
                f"of their number, {world_size}"
            )
        if seed < 0:
            raise UserError(f"seed must be 0 or more, not {seed}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for iteration in range(self.start, self.stop):
            yield self.keys(iteration)

    def keys(self, iteration: int) -> list[SampleKey]:
        """This rank's keys of one iteration."""
        positions, indices = self.places(range(iteration, iteration + 1))
        return [
            SampleKey(index, position, iteration, self.seed)
            for index, position in zip(indices.tolist(), positions.tolist(), strict=True)
        ]

    def places(self, iterations: range) -> tuple[np.ndarray, np.ndarray]:
        """Positions and indices of this rank's samples of some iterations, (n,) int64 each."""
        share = self.batch_size // self.world_size
        firsts = np.array(iterations, np.int64) * self.batch_size + self.rank * share
        positions = (firsts[:, None] + np.arange(share)).ravel()
        epochs, offsets = np.divmod(positions, self.length)
        indices = np.empty_like(positions)
        # Positions rise, and with them epochs: each epoch's samples stand together.
        bounds = [0, *(np.flatnonzero(np.diff(epochs)) + 1).tolist(), len(epochs)]
        for first, last in itertools.pairwise(bounds):
            order = _permutation(self.seed, int(epochs[first]), self.length)
            indices[first:last] = order[offsets[first:last]]
        return positions, indices


# A batch touches one or two epochs at a time; two data sets may be read in turns.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, _PERMUTATION, epoch]).permutation(length)
