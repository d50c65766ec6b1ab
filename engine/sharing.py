"""Work on many things shared out over the processes, with the results that one process gives."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Generic, TypeVar

from utils.cli import one_line
from utils.distributed import World, fail_together, gather_objects

T = TypeVar("T")

# How long a process may wait for the others': as long as the largest image takes, whatever the
# device. One that has ended is noticed at once.
PATIENCE = timedelta(days=1)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What one process made of one thing: a value or a problem, and what it warned of."""

    index: int
    value: T | None
    problem: str | None
    warnings: list[str]


def shared_out(action: Callable[[int], T], costs: Sequence[float], world: World) -> Iterator[T]:
    """``action(index)`` for every index of `costs`, in order, on every rank.

    With one process this is `map`. Several take one each in turn, the dearest first, so that those
    of one turn take about as long; results are yielded once all before them are there. Warnings
    are logged by rank 0.

    Args:
        action: must not talk to other ranks itself; its results can be pickled.
        costs: about how long each will take, in any unit.
        world: the ranks, all of which must exhaust the iterator.

    Raises:
        UserError: on rank 0, where `action` raises a ValueError or OSError on any rank; the others
            then exit quietly. With one process, what `action` raises.
    """
    if world.size == 1:
        yield from map(action, range(len(costs)))
        return
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    ahead: dict[int, T] = {}
    following = 0
    for first in range(0, len(order), world.size):
        mine = order[first + world.rank : first + world.rank + 1]
        outcome = _attempt(action, mine[0], world) if mine else None
        outcomes = [each for each in gather_objects(outcome) if each is not None]
        if world.is_main:
            for message in (message for each in outcomes for message in each.warnings):
                logger.warning("%s", message)
        if any(each.problem is not None for each in outcomes):
            fail_together(None if outcome is None else outcome.problem)
        ahead |= {each.index: each.value for each in outcomes}  # type: ignore[misc]
        while following in ahead:
            yield ahead.pop(following)
            following += 1


def _attempt(action: Callable[[int], T], index: int, world: World) -> _Outcome[T]:
    with _kept_warnings(world) as warnings:
        try:
            return _Outcome(index, action(index), None, warnings)
        except (ValueError, OSError) as error:
            return _Outcome(index, None, one_line(error), warnings)


class _Keeper(logging.Handler):
    """Keeps the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _kept_warnings(world: World) -> Iterator[list[str]]:
    """What is warned of in the block; nothing on rank 0, which shows it itself."""
    keeper = _Keeper()
    if world.is_main:
        yield keeper.messages
        return
    logging.getLogger().addHandler(keeper)
    try:
        yield keeper.messages
    finally:
        logging.getLogger().removeHandler(keeper)
