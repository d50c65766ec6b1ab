"""Draw training runs from their metrics: one PNG of loss, learning rate, PSNR, speed and the like.

``python -m utils.report save/carn-x4``
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.cli import Parser, run
from utils.errors import UserError
from utils.output_words import png_file
from utils.plotting import COLOURS, check_plotting, new_figure, save_figure
from utils.run_metrics import METRICS_NAME, is_validation, read_rows, validation_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", "--", ":", "-.")
# Above this many points a line is drawn pale, with its moving average over it.
_MANY = 200
_AVERAGED = 50
_DECADE = 10

# Name of a line, iterations, values.
Line = tuple[str, list[float], list[float]]


@dataclass(frozen=True)
class Run:
    """The metrics of one run.

    Attributes:
        name: of its folder.
        path: the file.
        rows: by iteration.
        broken: how many lines of the file were none.
    """

    name: str
    path: Path
    rows: list[dict[str, Any]]
    broken: int

    @classmethod
    def read(cls, place: Path) -> "Run":
        """The run in a folder, or of a metrics file.

        Raises:
            UserError: nothing there, no metrics, or none that can be read.
        """
        path = _metrics_path(place)
        rows, broken = read_rows(path)
        if not rows:
            raise UserError(f"{path} holds no metrics that can be read ({broken} broken lines)")
        rows.sort(key=lambda row: row["iteration"])
        return cls(path.absolute().parent.name, path, rows, broken)

    @property
    def picture(self) -> Path:
        """Where the run's own picture goes."""
        name = self.path.name
        if name.endswith(METRICS_NAME):
            return self.path.with_name(f"{name.removesuffix(METRICS_NAME)}report.png")
        return self.path.with_name(f"{self.path.stem}.report.png")

    def keys(self, prefix: str) -> list[str]:
        """The figures of training whose key starts with `prefix`."""
        rows = [row for row in self.rows if row["kind"] == "train"]
        return [
            key for key in dict.fromkeys(k for row in rows for k in row) if key.startswith(prefix)
        ]

    def train(self, *keys: str) -> Iterator[Line]:
        """Figures of training, each named after its key."""
        rows = [row for row in self.rows if row["kind"] == "train"]
        for key in keys:
            yield from _line(key, rows, key)

    def validation(self, key: str) -> Iterator[Line]:
        """A figure of each validation, named after the set and the way of running the model."""
        groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in filter(is_validation, self.rows):
            kinds = groups.setdefault(validation_name(row), {})
            kinds.setdefault(row.get("validated_on", ""), []).append(row)
        for name, kinds in groups.items():
            for kind, rows in kinds.items():
                # Figures of other images or channels are another line.
                yield from _line(f"{name} ({kind})" if kind and len(kinds) > 1 else name, rows, key)


def _metrics_path(place: Path) -> Path:
    if place.is_file():
        return place
    if not place.exists():
        raise UserError(f"no such run: {place}")
    for name in (METRICS_NAME, f"release.{METRICS_NAME}"):
        if (place / name).is_file():
            return place / name
    raise UserError(f"{place} is no folder of a run: it has no {METRICS_NAME}")


def _line(name: str, rows: Sequence[dict[str, Any]], key: str) -> Iterator[Line]:
    """Where `rows` have numbers for `key`; nothing where none has."""
    found = [(row["iteration"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    if found:
        yield name, [float(x) for x, _ in found], [float(y) for _, y in found]


@dataclass(frozen=True)
class _Panel:
    """One of the plots.

    Attributes:
        title: with its unit.
        lines: those of a run.
        log: a logarithmic axis, where all values are above 0.
        factor: from a value to what is shown.
        marks: circles at the values, and a star at the largest one.
        from_zero: the axis starts there.
    """

    title: str
    lines: Callable[[Run], Iterator[Line]]
    log: bool = False
    factor: float = 1.0
    marks: bool = False
    from_zero: bool = False


_PANELS = (
    _Panel("loss", lambda run: run.train("loss"), log=True),
    _Panel("validation PSNR (dB)", lambda run: run.validation("psnr"), marks=True),
    _Panel("learning rate", lambda run: run.train("lr"), log=True),
    _Panel("parts of the loss", lambda run: run.train(*run.keys("loss_")), log=True),
    _Panel("heavy pixels (%)", lambda run: _heavy_shares(run), factor=100.0),
    _Panel("gradient norm", lambda run: run.train("grad_norm"), log=True),
    _Panel("iterations per second", lambda run: run.train("iterations_per_s"), from_zero=True),
)


def _heavy_shares(run: Run) -> Iterator[Line]:
    """In training and validation, where it is not all of them."""
    for name, xs, ys in (*run.train("heavy_share"), *run.validation("heavy_share")):
        if min(ys) < 1:
            yield "training" if name == "heavy_share" else name, xs, ys


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write the picture of one run, or of several to be compared.

    Raises:
        UserError: none of them has figures to draw.
    """
    panels = [panel for panel in _PANELS if any(any(panel.lines(each)) for each in runs)]
    if not panels:
        raise UserError(f"{runs[0].path} has nothing to draw: no losses, no validation")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.5 * columns, 0.5 + 2.6 * rows)
    figure.suptitle(", ".join(each.name for each in runs))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel, runs)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    # Shared axes hide their numbers but in the last row, whose last plot may be missing.
    for axes in grid.flat[len(panels) - columns : len(panels)]:
        axes.set_xlabel("iteration")
        axes.xaxis.set_tick_params(labelbottom=True)
    save_figure(figure, path)


def _draw_panel(axes: "Axes", panel: _Panel, runs: Sequence[Run]) -> None:
    """A colour for each run, a style for each line; of a single run a colour for each line."""
    several = len(runs) > 1
    shown: list[float] = []
    for number, each in enumerate(runs):
        lines = list(panel.lines(each))
        for index, (name, xs, values) in enumerate(lines):
            ys = [panel.factor * value for value in values]
            shown += ys
            label = name if not several else each.name
            if several and (len(lines) > 1 or panel.marks):
                label += f", {name}"
            colour = COLOURS[(number if several else index) % len(COLOURS)]
            style = _STYLES[index % len(_STYLES)] if several else "-"
            _draw_line(axes, xs, ys, panel, color=colour, linestyle=style, label=label)
    if panel.log and min(shown) > 0:
        _make_logarithmic(axes, max(shown) / min(shown))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize="medium")
    axes.grid(alpha=0.3)
    if len(axes.get_legend_handles_labels()[0]) > 1 or panel.marks:
        axes.legend(fontsize="small")


def _make_logarithmic(axes: "Axes", ratio: float) -> None:
    """Within a decade powers of ten would say little: plain numbers there."""
    axes.set_yscale("log")
    if ratio < _DECADE:
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(lambda value, _: f"{value:g}")


def _draw_line(axes: "Axes", xs: list[float], ys: list[float], panel: _Panel, **style: Any) -> None:
    if panel.marks:
        best = int(np.argmax(ys))
        style["label"] += f": best {ys[best]:.3f} at {xs[best]:.0f}"
        axes.plot(xs, ys, marker=".", **style)
        axes.plot(xs[best], ys[best], marker="*", markersize=12, color=style["color"])
        return
    if len(ys) <= _MANY:
        axes.plot(xs, ys, **style)
        return
    axes.plot(xs, ys, **{**style, "label": None}, alpha=0.3, linewidth=0.7)
    width = len(ys) // _AVERAGED
    smooth = np.convolve(ys, np.full(width, 1 / width), mode="valid")
    axes.plot(xs[width // 2 :][: len(smooth)], smooth, **style)


def main() -> None:
    """Parse the command line, draw the runs, say where the picture is."""
    parser = Parser(
        description="Draw training runs from their metrics: loss, learning rate, validation PSNR, "
        "heavy pixels, gradient norm and speed, in one picture.",
        example="python -m utils.report save/carn-x4\n"
        "  python -m utils.report save/carn-x4 save/fsrcnn-x4 --out results/tmp/compared.png",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="Folder of a run, or its metrics file; several are drawn into the same plots.",
    )
    parser.add_argument(
        "--out",
        type=png_file,
        metavar="PNG",
        help="File for the picture. Default: report.png beside the metrics (of a release, "
        "release.report.png).",
    )
    args = parser.parse_args()
    if len(args.runs) > 1 and args.out is None:
        raise UserError("several runs: name the file for their picture with --out")
    check_plotting("a report")
    runs = [Run.read(place) for place in args.runs]
    path = args.out or runs[0].picture
    draw(runs, path)
    for each in runs:
        if each.broken:
            print(f"{each.path}: {each.broken} broken lines left out", file=sys.stderr)
    print(f"plot: {path}")


if __name__ == "__main__":
    run(main)
