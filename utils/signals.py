"""The signals that ask a run to end."""

import signal


def ending_signals() -> list[signal.Signals]:
    """SIGINT, SIGTERM and, where nobody ignores it, SIGHUP: that of a terminal which closes.

    Under `nohup` SIGHUP is ignored, and has to stay so. Systems other than POSIX have none.
    """
    hang_up = getattr(signal, "SIGHUP", None)
    found = [signal.SIGINT, signal.SIGTERM]
    if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
        found.append(hang_up)
    return found
