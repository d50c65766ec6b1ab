"""What a sweep leaves to be read: a table, numbers for a JSON file, and a plot."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.sweep import Point, PointFigures
from utils.plotting import COLOURS, new_figure, save_figure

_COLOURS = {"budget": COLOURS[0], "oracle": COLOURS[1], "mark": COLOURS[-1]}
_LABELS = {
    "budget": "budget for each image, by the classifier",
    "oracle": "the same, by an oracle that knows HR",
}
_MARKERS = ("s", "^", "D")


def print_table(
    points: Sequence[Point],
    means: Sequence[PointFigures],
    original_flops: float,
    *,
    is_timed: bool,
    write: Callable[[str], None],
) -> None:
    """One line for each point, the mean over all images."""
    shares = [f"#{index} %" for index in range(len(means[0].shares))]
    if len(shares) == 2:
        shares = ["light %", "heavy %"]
    titles = ["routing", "PSNR dB", "GFLOPs paper", "GFLOPs executed", "of original", *shares]
    titles.append(f"time s ({'measured' if is_timed else 'estimated'})")
    widths = [max(len(point.name) for point in points)]
    widths += [max(8, len(title)) for title in titles[1:]]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    previous = None
    for point, mean in zip(points, means, strict=True):
        if previous is None:
            write(_line(titles, widths))
        if point.curve != previous:
            write(rule)
        previous = point.curve
        cells = [point.name, f"{mean.psnr:.3f}"]
        cells += [f"{flops / 1e9:.4f}" for flops in (mean.flops_paper, mean.flops_executed)]
        cells += [f"{mean.flops_executed / original_flops:.3f}"]
        cells += [f"{100 * share:.2f}" for share in mean.shares]
        write(_line([*cells, f"{mean.time_s:.3f}"], widths))
    write(rule)
    write("N% of a curve: of the way from all-light to all-heavy, in executed FLOPs")
    write("The oracle takes pixels in the order in which their errors fall, which only HR tells")


def to_json(
    points: Sequence[Point],
    names: Sequence[str],
    images: Sequence[Sequence[PointFigures]],
    original_flops: Sequence[float],
    *,
    is_timed: bool,
) -> dict[str, Any]:
    """All points with their figures by image; `images` and `original_flops` are by image, too."""
    content = []
    for index, point in enumerate(points):
        figures = [of_image[index] for of_image in images]
        named = zip(names, figures, strict=True)
        content.append(
            {
                "curve": point.curve,
                "name": point.name,
                "share": point.share,
                "mean": PointFigures.mean(figures).to_json(),
                "images": [{"name": name, **f.to_json()} for name, f in named],
            }
        )
    return {
        "points": content,
        "time": "measured" if is_timed else "estimated",
        "original_flops_executed": dict(zip(names, original_flops, strict=True)),
    }


def write_plot(
    path: Path,
    points: Sequence[Point],
    means: Sequence[PointFigures],
    original_flops: float,
    *,
    title: str,
    is_timed: bool,
) -> None:
    """PSNR over executed FLOPs and over time, both curves and the marks."""
    figure = new_figure(11, 4.6)
    by_flops, by_time = figure.subplots(1, 2, sharey=True)
    for axes, xs in (
        (by_flops, [mean.flops_executed / 1e9 for mean in means]),
        (by_time, [mean.time_s * 1e3 for mean in means]),
    ):
        _plot_points(axes, points, xs, [mean.psnr for mean in means])
        axes.grid(alpha=0.3)
    by_flops.set_xlabel("executed GFLOPs per image")
    by_flops.set_ylabel("PSNR (dB)")
    share = by_flops.secondary_xaxis(
        "top", functions=(lambda g: g * 1e9 / original_flops, lambda s: s * original_flops / 1e9)
    )
    share.set_xlabel("share of the original's executed FLOPs")
    by_time.set_xlabel(f"{'measured' if is_timed else 'estimated'} time per image (ms)")
    by_flops.legend(loc="lower right")
    figure.suptitle(title)
    save_figure(figure, path)


def _plot_points(
    axes: Any, points: Sequence[Point], xs: Sequence[float], ys: Sequence[float]
) -> None:
    for curve, label in _LABELS.items():
        chosen = [index for index, point in enumerate(points) if point.curve == curve]
        axes.plot(
            [xs[index] for index in chosen],
            [ys[index] for index in chosen],
            color=_COLOURS[curve],
            marker=".",
            label=label,
        )
    marks = [index for index, point in enumerate(points) if point.curve == "mark"]
    for index, marker in zip(marks, _MARKERS, strict=False):
        axes.plot(
            xs[index],
            ys[index],
            marker,
            color=_COLOURS["mark"],
            fillstyle="none",
            markersize=8,
            label=points[index].name,
        )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([f"{cells[0]:<{widths[0]}}", *padded])
