"""Tensorboard's events, which a run can do without."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

logger = logging.getLogger(__name__)


class Events:
    """Scalars and pictures for tensorboard; where they cannot be written, a warning and no more.

    tensorboardX writes in a thread of its own. An error, as of a full disk, would end that thread,
    and its queue, once full, would stop the training for good.

    Args:
        folder: of the run.
        purge_step: what earlier files hold from this step on is not shown.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        self._failed = False
        self._writer = SummaryWriter(str(folder))
        file = self._writer.file_writer.event_writer._ev_writer
        for name in ("write_event", "flush", "close"):
            setattr(file, name, self._guarded(getattr(file, name)))
        # What SummaryWriter's own `purge_step` writes, but not before the thread is guarded.
        start = SessionLog(status=SessionLog.START)
        self._writer.file_writer.add_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._writer.file_writer.add_event(Event(step=purge_step, session_log=start))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """A point of the curve `tag`, after `step` iterations."""
        self._writer.add_scalar(tag, value, step)

    def add_image(self, tag: str, picture: np.ndarray, step: int) -> None:
        """A picture (H, W, 3) uint8 under `tag`, after `step` iterations."""
        self._writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._writer.close()

    def _guarded(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """`write`, which does nothing from its first failure on."""

        def guarded(*args: Any) -> Any:
            """What `write` returns; None where it fails, or has failed before."""
            if self._failed:
                return None
            try:
                return write(*args)
            except OSError as error:
                self._failed = True
                # The log may be on the same full disk, and this thread must not end.
                with contextlib.suppress(OSError):
                    logger.warning(
                        "tensorboard gets no more of this run: its file cannot be written (%s)",
                        error.strerror or error,
                    )
                return None

        return guarded
