"""Drawing with matplotlib, which is imported only where something is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from utils.atomic import replace_file
from utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's: distinct for colour-blind readers, and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 150


def check_plotting(word: str) -> None:
    """Refuse before anything is computed.

    Args:
        word: what needs matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"{word} needs matplotlib: pip install matplotlib") from error


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG file in one go: an older one stays whole until then."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png")
