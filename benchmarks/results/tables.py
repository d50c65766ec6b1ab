"""Markdown tables of what was measured. A figure that is not there yet is a dash."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.results.quality import BICUBIC_PATH
from benchmarks.results.speed import ORIGINALS
from benchmarks.results.subjects import (
    LABELS,
    ROUTINGS,
    SETS,
    SUBJECTS,
    Subject,
    read_json,
)

NONE = "-"
ROWS = ("original", *ROUTINGS)

Figures = dict[str, Any]


def measured_subjects() -> list[Subject]:
    """Those that have figures, in order."""
    return [subject for subject in SUBJECTS if subject.figures_path.is_file()]


def row_of(subject: Subject, name: str, key: str) -> Figures:
    """A subject's figures on a set in one row; empty where there are none."""
    of_set = read_json(subject.figures_path).get("sets", {}).get(name, {})
    return of_set.get("rows", {}).get(key, {})


def share_of_original(subject: Subject, name: str, key: str) -> float | None:
    """Executed FLOPs over the original's."""
    row, original = (row_of(subject, name, each) for each in (key, "original"))
    if "flops_executed" not in row or "flops_executed" not in original:
        return None
    return row["flops_executed"] / original["flops_executed"]


def loss(subject: Subject, name: str, key: str) -> float | None:
    """RGB PSNR under the subject's own all-heavy output, in dB."""
    row, heavy = (row_of(subject, name, each) for each in (key, "heavy"))
    if "psnr_rgb" not in row or "psnr_rgb" not in heavy:
        return None
    return heavy["psnr_rgb"] - row["psnr_rgb"]


def share_of_time(subject: Subject, key: str) -> float | None:
    """Time over the optimised original's, on images of BSD100."""
    rows = read_json(subject.speed_path).get("images", {}).get("rows", {})
    if key not in rows:
        return None
    return rows[key]["time_s"] / rows["original_optimized"]["time_s"]


def machine_of(subject: Subject) -> str:
    """The machine of :func:`share_of_time`, in words."""
    machine = read_json(subject.speed_path)["machine"]
    return (
        f"{machine['device_name']} ({machine['cpu_capability']}, {machine['usable_cores']} cores)"
    )


def quality_table(name: str) -> str:
    """All networks on one set."""
    titles = ["weights", "routing", "PSNR RGB", "unrefined", "PSNR Y", "SSIM Y"]
    titles += ["GFLOPs, paper", "GFLOPs, executed", "of the original", "heavy pixels"]
    bicubic = read_json(BICUBIC_PATH)["sets"][name]["rows"]["bicubic"]
    lines = [["bicubic", "", *_quality_cells(bicubic), "", "", "", ""]]
    for subject in measured_subjects():
        for key in ROWS:
            row = row_of(subject, name, key)
            if "psnr_rgb" not in row:
                continue
            lines.append(
                [
                    subject.title,
                    LABELS[key],
                    *_quality_cells(row),
                    giga(row["flops_paper"]),
                    giga(row["flops_executed"]),
                    percent(share_of_original(subject, name, key)),
                    percent(row["heavy_share"]) if "heavy_share" in row else "",
                ]
            )
    return table(titles, lines, left=2)


def speed_table(subject: Subject) -> str:
    """One subject's cost, time and memory on the picture, and time on images of BSD100."""
    content = read_json(subject.speed_path)
    rows, images = content["picture"]["rows"], content.get("images", {}).get("rows", {})
    titles = ["routing", "GFLOPs, paper", "GFLOPs, executed", "of the original", "heavy pixels"]
    titles += ["time", "of the optimised", "memory", "BSD100 image", "of the optimised"]
    one, best = rows["original"], rows["original_optimized"]
    lines = []
    for key in (*ORIGINALS, *ROUTINGS):
        row, image_s = rows[key], images.get(key, {}).get("time_s")
        peak = row.get("peak_memory_bytes")
        lines.append(
            [
                LABELS[key],
                giga(row["flops_paper"]),
                giga(row["flops_executed"]),
                percent(row["flops_executed"] / one["flops_executed"]),
                "" if row["heavy_share"] is None else percent(row["heavy_share"]),
                milliseconds(row["time_s"]),
                percent(row["time_s"] / best["time_s"]),
                "" if peak is None else f"{peak / 2**20:.0f} MiB",
                milliseconds(image_s),
                percent(share_of_time(subject, key)),
            ]
        )
    return table(titles, lines, left=1)


def weights_table() -> str:
    """The released weights, for those who choose some: a line for each way of use."""
    titles = ["weights", "iterations", *SETS, "executed FLOPs, of the original", "heavy pixels"]
    bicubic = [read_json(BICUBIC_PATH)["sets"].get(s, {}).get("rows", {}) for s in SETS]
    cells = [decibels(rows.get("bicubic", {}).get("psnr_rgb")) for rows in bicubic]
    lines = [["bicubic", "", *cells, "", ""]]
    for subject in measured_subjects():
        if not subject.is_official:
            lines += _released_lines(subject)
    # Small and large networks share an original.
    unique = list(dict.fromkeys(tuple(line) for line in lines))
    return table(titles, unique, left=1)


def _released_lines(subject: Subject) -> list[list[str]]:
    content, last = read_json(subject.figures_path), SETS[-1]
    lines = []
    for key in ("original", "heavy", "k0", "adm"):
        about = content.get("original" if key == "original" else "pcsr", {})
        config = subject.original if key == "original" else subject.pcsr
        row = row_of(subject, last, key)
        if key == "original" and not about:
            continue  # it has no weights
        iterations = [about.get("phase0_iterations"), about.get("iterations")]
        word = LABELS[key].removeprefix("PCSR, ")
        lines.append(
            [
                f"`{config}`" if key == "original" else f"`{config}`, {word}",
                " + ".join(str(each) for each in iterations if each is not None),
                *(decibels(row_of(subject, name, key).get("psnr_rgb")) for name in SETS),
                percent(share_of_original(subject, last, key)),
                percent(row["heavy_share"]) if "heavy_share" in row else "",
            ]
        )
    return lines


def table(titles: Sequence[str], lines: Iterable[Sequence[str]], *, left: int) -> str:
    """A markdown table, the first `left` columns to the left."""
    rules = ["---" if index < left else "---:" for index in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rules, *lines))


def _or_none(text: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: NONE if value is None else text(value)


decibels = _or_none(lambda value: f"{value:.2f}")
difference = _or_none(lambda value: f"{value:.3f}")
percent = _or_none(lambda value: f"{100 * value:.1f} %")
milliseconds = _or_none(lambda value: f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.2f} s")


def giga(flops: float) -> str:
    """1e9 FLOPs with three digits behind the point, two where there are many before it."""
    value = flops / 1e9
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _quality_cells(row: Figures) -> list[str]:
    unrefined = row.get("psnr_rgb_unrefined")
    return [
        decibels(row["psnr_rgb"]),
        "" if unrefined is None else decibels(unrefined),
        decibels(row["psnr_y"]),
        f"{row['ssim_y']:.4f}",
    ]
