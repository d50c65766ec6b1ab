"""Rows of figures, their ratios, and tables of them."""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import Case, Size
from engine.restore import Restored

Ratios = dict[str, float | None]


@dataclass
class Row:
    """What was measured on one case at one size. Attribute names are the JSON file's keys.

    Attributes:
        backbone, variant, routing, precision: see `benchmarks.cases.Case`.
        device, threads, machine: on what, see `utils.machine.describe`.
        lr_height, lr_width: in pixels.
        time_s_median, time_s_min: over the rounds; from LR on the device to SR.
        flops_paper, flops_executed: see `utils.flops`.
        peak_memory_bytes: of a process that does nothing else; None where it was not measured.
        heavy_share: share of the pixels that the heaviest upsampler computed; None for originals.
        encoder_s: PCSR's encoder alone, in the same rounds; None but for the fast engine.
        matmul_peak_flops_per_s: the device's best at a product of two matrices in this precision.
        weights: the checkpoint; None for untrained weights.
        ratios: see :func:`add_ratios`.
    """

    backbone: str
    variant: str
    routing: str | None
    precision: str
    device: str
    threads: int
    lr_height: int
    lr_width: int
    time_s_median: float
    time_s_min: float
    flops_paper: int
    flops_executed: int
    peak_memory_bytes: int | None
    heavy_share: float | None
    encoder_s: float | None
    matmul_peak_flops_per_s: float
    weights: str | None
    machine: dict[str, Any]
    ratios: Ratios = field(default_factory=dict)

    @classmethod
    def of(
        cls, case: Case, lr_size: Size, restored: Restored, times_s: Sequence[float], **other: Any
    ) -> "Row":
        """From a result of the case, the times of all rounds, and the other attributes."""
        return cls(
            **dataclasses.asdict(case),
            lr_height=lr_size[0],
            lr_width=lr_size[1],
            time_s_median=statistics.median(times_s),
            time_s_min=min(times_s),
            flops_paper=restored.flops_paper,
            flops_executed=restored.flops_executed,
            heavy_share=restored.shares[-1] if restored.shares else None,
            **other,
        )

    @property
    def us_per_lr_px(self) -> float:
        """Median time per LR pixel, in microseconds."""
        return 1e6 * self.time_s_median / (self.lr_height * self.lr_width)

    @property
    def flops_per_s(self) -> float:
        """Executed FLOPs per second."""
        return self.flops_executed / self.time_s_median


def add_ratios(rows: Sequence[Row]) -> None:
    """Fill in the ratios of median times within rows of one size. None where a part is missing.

    ``over_original`` and ``over_reference``: this row's time over theirs, which are fp32;
    ``over_original_optimized``: over the optimised original in the same precision;
    ``rest_over_encoder``: everything beside the encoder over the encoder;
    ``speedup_over_fp32``: how often this row goes into the same in fp32.
    """
    times = {_key(row): row.time_s_median for row in rows}

    def over(row: Row, variant: str, routing: str | None, precision: str) -> float | None:
        other = (row.backbone, variant, routing, precision)
        other_s = None if other == _key(row) else times.get(other)
        return None if other_s is None else row.time_s_median / other_s

    for row in rows:
        encoder_s = row.encoder_s
        over_fp32 = over(row, row.variant, row.routing, "fp32")
        row.ratios = {
            "over_reference": over(row, "reference", row.routing, "fp32"),
            "over_original": over(row, "original", None, "fp32"),
            "over_original_optimized": over(row, "original_optimized", None, row.precision),
            "rest_over_encoder": encoder_s and (row.time_s_median - encoder_s) / encoder_s,
            "speedup_over_fp32": over_fp32 and 1 / over_fp32,
        }


def _key(row: Row) -> tuple[str, str, str | None, str]:
    return row.backbone, row.variant, row.routing, row.precision


_CASE_TITLES = ("variant", "routing", "type")
_FIGURE_TITLES = (
    "time s",
    "min s",
    "us/LR px",
    "GF paper",
    "GF exec.",
    "GF/s",
    "% peak",
    "MiB",
    "heavy %",
)
_RATIO_TITLES = {
    "over_reference": "/reference",
    "over_original": "/original",
    "over_original_optimized": "/optimized",
    "rest_over_encoder": "rest/enc.",
    "speedup_over_fp32": "fp32/this",
}
LEGEND = """\
time: median of the rounds, all rows of a table in turn, from LR on the device to SR
GF paper, GF exec.: 1e9 FLOPs as published tables count them, and as run; GF/s: as run
% peak: of this device's best at a product of two matrices in the same precision
MiB: {memory}
heavy %: pixels that the heaviest upsampler computed
/reference, /original, /optimized: time over that of the reference engine, of the original network
  as published (both fp32), and of the original with the fast engine's graph optimisations (same
  precision); rest/enc.: time beside the encoder over the encoder's; fp32/this: gain of precision"""


def figures_table(rows: Sequence[Row]) -> str:
    """Figures, a line for each row."""
    lines = []
    for row in rows:
        memory, heavy = row.peak_memory_bytes, row.heavy_share
        peak_share = row.flops_per_s / row.matmul_peak_flops_per_s
        lines.append(
            [
                *_case_cells(row),
                f"{row.time_s_median:.4f}",
                f"{row.time_s_min:.4f}",
                f"{row.us_per_lr_px:.3f}",
                f"{row.flops_paper / 1e9:.2f}",
                f"{row.flops_executed / 1e9:.2f}",
                f"{row.flops_per_s / 1e9:.1f}",
                f"{100 * peak_share:.1f}",
                "-" if memory is None else f"{memory / 2**20:.0f}",
                "-" if heavy is None else f"{100 * heavy:.1f}",
            ]
        )
    return format_table([*_CASE_TITLES, *_FIGURE_TITLES], lines)


def ratios_table(rows: Sequence[Row]) -> str:
    """Ratios, a line for each row that has some."""
    lines = [
        [*_case_cells(row), *(_ratio_cell(row.ratios[name]) for name in _RATIO_TITLES)]
        for row in rows
        if any(value is not None for value in row.ratios.values())
    ]
    return format_table([*_CASE_TITLES, *_RATIO_TITLES.values()], lines)


def growth_table(rows: Sequence[Row]) -> str:
    """Time per LR pixel at all sizes, and the largest over the smallest."""
    sizes = sorted({(row.lr_height, row.lr_width) for row in rows}, key=lambda s: s[0] * s[1])
    by_case: dict[tuple[str, ...], dict[Size, float]] = {}
    for row in rows:
        times = by_case.setdefault((row.backbone, *_case_cells(row)), {})
        times[row.lr_height, row.lr_width] = row.us_per_lr_px
    lines = []
    for case, times in by_case.items():
        cells = [f"{times[size]:.3f}" if size in times else "-" for size in sizes]
        spread = max(times.values()) / min(times.values())
        lines.append([*case, *cells, f"{spread:.2f}"])
    titles = ["backbone", *_CASE_TITLES, *(f"{w}x{h}" for h, w in sizes), "max/min"]
    return format_table(titles, lines, left=4)


def format_table(titles: Sequence[str], lines: Sequence[Sequence[str]], left: int = 3) -> str:
    """Aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(titles, *lines, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(titles), rule, *map(line, lines)])


def _case_cells(row: Row) -> list[str]:
    return [row.variant, row.routing or "-", row.precision]


def _ratio_cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
