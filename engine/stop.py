"""Ending a run from outside: SIGINT, SIGTERM and SIGHUP let the iteration finish."""

import signal
import time
from types import FrameType
from typing import Any

from utils.signals import ending_signals

# A terminal's Ctrl-C comes twice under torchrun: from the terminal and from torchrun.
_SAME_S = 2.0


class StopSignal:
    """Notes the signals that end a run while it is entered, for a loop to end where it is whole.

    Who asks again, 2 seconds later or more, is not kept waiting: KeyboardInterrupt is raised.

    Attributes:
        number: of the first signal; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        self._noted_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in ending_signals():
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now - self._noted_at >= _SAME_S:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._noted_at = int(number), now
