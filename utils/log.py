"""Logging of the scripts: one format, the console and a file."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm


class _ConsoleHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record to standard error."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _FileHandler(logging.FileHandler):
    """A full disk ends the run with its message, not with a traceback in mid-air."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Pass the error on to whoever logs."""
        raise


def set_up(*, main: bool = True) -> None:
    """Send log records to the console.

    Args:
        main: False on ranks other than 0, which show only errors.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    console = _ConsoleHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    console.setLevel(logging.INFO if main else logging.ERROR)
    root.addHandler(console)
    root.setLevel(logging.INFO)
    # Where it is first used, it says that it has made a list of fonts.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def add_file(path: Path) -> None:
    """From now on, append log records to `path`, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.getLogger().addHandler(handler)
