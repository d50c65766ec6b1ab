"""Damaged training images that a run goes on without: each is named once, in rank 0's log."""

import logging
from typing import Protocol

from utils.distributed import gather_objects

logger = logging.getLogger(__name__)


class Skips(Protocol):
    """A data set that may do without damaged images, see `datasets.folders`."""

    def has_untold(self) -> bool: ...

    def untold(self) -> dict[str, str]: ...


class SkippedImages:
    """Brings what any rank, or a loader process of it, has skipped into the log of rank 0.

    Only rank 0 has a log, and its loader processes are older than the file of it. So nothing is
    logged where it is met: when the ranks meet anyway, each says whether it :meth:`has_news`, and
    where one has, all call :meth:`report`.

    Args:
        dataset: of this rank.
    """

    def __init__(self, dataset: Skips) -> None:
        self._dataset = dataset
        self._named: set[str] = set()

    def has_news(self) -> bool:
        """Whether this rank has skipped an image that it has not yet reported."""
        return self._dataset.has_untold()

    def report(self) -> None:
        """Log what is new on any rank. Every rank must call it."""
        for found in gather_objects(self._dataset.untold()):
            for path, reason in found.items():
                # Several ranks may meet one file, each in its time.
                if path not in self._named:
                    logger.warning("skipped, the next one takes its place: %s", reason)
            self._named.update(found)
