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


def set_up(log_file: Path | None = None, *, main: bool = True) -> None:
    """Send log records to the console and, if given, to `log_file` (appended).

    Args:
        main: False on ranks other than 0: only errors are shown, and no file is written.
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
    if log_file is not None and main:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        root.addHandler(file)
