"""PSNR against executed FLOPs and against time, on BSD100."""

from pathlib import Path

from benchmarks.plots import Point, draw
from benchmarks.results.speed import EVERY, TIMED_SET
from benchmarks.results.subjects import RESULTS, ROUTINGS, SCALE, Subject, read_json
from benchmarks.results.tables import ROWS, row_of
from utils.atomic import replace_file

_DPI = 110


def path_of(subject: Subject) -> Path:
    """Where a subject's curves are."""
    return RESULTS / f"curves-{subject.name}.png"


def has_curves(subject: Subject) -> bool:
    """Whether quality and time were measured."""
    timed = read_json(subject.speed_path).get("images", {})
    return bool(timed) and "psnr_rgb" in row_of(subject, TIMED_SET, "heavy")


def draw_curves(subject: Subject) -> None:
    """Write them."""
    speed = read_json(subject.speed_path)
    machine, times = speed["machine"], speed["images"]["rows"]
    # The line of budgets runs from all-light to all-heavy, which are marks, too.
    budgets = ["heavy", *(key for key in ROUTINGS if key.startswith("way")), "light"]
    marks = ["original_optimized", *(key for key in ROWS if key not in budgets[1:-1])]
    points = []
    for key, label in [*((key, key) for key in marks), *((key, "budget") for key in budgets)]:
        row = row_of(subject, TIMED_SET, key.removesuffix("_optimized"))
        if "psnr_rgb" in row:
            figures = (row["psnr_rgb"], row["flops_paper"], row["flops_executed"])
            points.append(Point(subject.title, label, *figures, times[key]["time_s"]))
    title = (
        f"x{SCALE}, mean of {TIMED_SET}; time: every {EVERY}th image, {machine['device_name']}, "
        f"threads: {machine['torch_threads']}"
    )
    with replace_file(path_of(subject)) as temporary:
        draw(points, title).savefig(temporary, dpi=_DPI)
