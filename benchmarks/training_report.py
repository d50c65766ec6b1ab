"""What a training benchmark finds, as rows of JSON and as tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import format_table
from benchmarks.training_cases import Case


@dataclass
class Row:
    """One case, measured; None where something was not.

    Attributes:
        what, variant, backbone, phase, precision, compile, cache, processes: see
            `benchmarks.training_cases.Case`.
        samples_per_s: all samples of the process, or of all iterations.
        step_s_median: of an iteration without its data.
        iterations_per_s: of iterations, in runs with their data.
        data_share: of the time that is spent waiting for data.
        machine: see `utils.machine.describe`.
    """

    what: str
    variant: str
    backbone: str | None
    phase: int | None
    precision: str | None
    compile: str | None
    cache: str | None
    processes: int
    samples_per_s: float
    step_s_median: float | None
    iterations_per_s: float | None
    data_share: float | None
    machine: dict[str, Any]

    @classmethod
    def of(cls, case: Case, machine: dict[str, Any], samples_per_s: float, **found: float) -> "Row":
        """A row with what was `found`."""
        return cls(
            **vars(case),
            samples_per_s=samples_per_s,
            step_s_median=found.get("step_s_median"),
            iterations_per_s=found.get("iterations_per_s"),
            data_share=found.get("data_share"),
            machine=machine,
        )


@dataclass(frozen=True)
class Bar:
    """A ratio, and what it should be.

    Attributes:
        text: what over what.
        value: the ratio, or a figure.
        lowest, highest: the bar; None for no bar.
    """

    text: str
    value: float
    lowest: float | None = None
    highest: float | None = None

    @property
    def cells(self) -> list[str]:
        """For a table."""
        bar, verdict = "-", "-"
        if self.lowest is not None:
            bar, met = f">= {self.lowest:g}", self.value >= self.lowest
        if self.highest is not None:
            bar, met = f"<= {self.highest:g}", self.value <= self.highest
        if bar != "-":
            verdict = "met" if met else "missed"
        return [self.text, f"{self.value:.3g}", bar, verdict]


def figures_table(rows: Sequence[Row]) -> str:
    """Figures, a line for each row."""
    words = ("what", "variant", "backbone", "phase", "precision", "compile", "cache")
    lines = [
        [
            *("-" if getattr(row, word) is None else str(getattr(row, word)) for word in words),
            str(row.processes),
            f"{row.samples_per_s:.1f}",
            _cell(row.step_s_median, "{:.4f}"),
            _cell(row.iterations_per_s, "{:.3g}"),
            _cell(row.data_share, "{:.1%}"),
        ]
        for row in rows
    ]
    titles = [*words, "processes", "samples/s", "step s", "iterations/s", "data share"]
    return format_table(titles, lines, left=len(words))


def bars_table(rows: Sequence[Row]) -> str:
    """Ratios of rows of one run, and the bars that some of them have."""
    lines = [bar.cells for bar in [*_data_bars(rows), *_step_bars(rows), *_run_bars(rows)]]
    return format_table(["ratio", "value", "bar", ""], lines, left=1)


def _data_bars(rows: Sequence[Row]) -> list[Bar]:
    base = _first(rows, lambda row: row.what == "data" and row.variant == "straightforward")
    if base is None:
        return []
    return [
        Bar(
            f"samples/s, {row.cache}, {row.processes} processes / straightforward",
            row.samples_per_s / base.samples_per_s,
            lowest=10 if row.cache == "device" else None,
        )
        for row in rows
        if row.what == "data" and row.variant == "ours"
    ]


def _step_bars(rows: Sequence[Row]) -> list[Bar]:
    steps = [row for row in rows if row.what == "step" and row.step_s_median is not None]
    bars = []
    for row in (row for row in steps if row.variant == "dense"):
        alike = [s for s in steps if (s.backbone, s.phase) == (row.backbone, row.phase)]
        name = f"{row.backbone} phase {row.phase}: dense {row.precision}"
        name += "" if row.compile == "none" else f" compile {row.compile}"
        base = _first(alike, lambda s: s.variant == "reference")
        on_cpu = row.machine["device"] == "cpu"
        plain = row.precision == "fp32" and row.compile == "none"
        if base is not None:
            barred = plain and on_cpu and (row.phase == 1 or row.backbone in ("carn", "fsrcnn"))
            ratio = _seconds(row) / _seconds(base)
            bars.append(Bar(f"step, {name} / reference", ratio, highest=0.6 if barred else None))
        full = _first(alike, lambda s: s.variant == "dense" and s.precision == "fp32")
        if full is not None and row.precision == "bf16" and row.compile == full.compile:
            barred = on_cpu and row.backbone == "carn" and bool(row.machine["bf16_units"])
            gain = _seconds(full) / _seconds(row)
            bars.append(Bar(f"speed, {name} / fp32", gain, lowest=1.4 if barred else None))
    return bars


def _run_bars(rows: Sequence[Row]) -> list[Bar]:
    bars = []
    rates: dict[tuple[str | None, int | None], float] = {}
    for row in (row for row in rows if row.what == "end_to_end"):
        if row.iterations_per_s is None or row.data_share is None:
            continue
        network = row.backbone, row.phase
        name = f"{row.backbone} phase {row.phase} {row.variant} {row.precision}"
        on_gpu = row.machine["device"] != "cpu" and row.variant == "ours"
        low = 150 if on_gpu and network == ("carn", 0) else None
        bars.append(Bar(f"iterations/s, {name}", row.iterations_per_s, lowest=low))
        if row.variant == "straightforward":
            rates[network] = row.iterations_per_s
        elif network in rates:
            gain = row.iterations_per_s / rates[network]
            bars.append(Bar(f"iterations/s, {name} / straightforward", gain))
        high = 0.05 if on_gpu and row.cache == "device" else None
        bars.append(Bar(f"data share, {name}", row.data_share, highest=high))
    return bars


def _first(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> Row | None:
    return next((row for row in rows if wanted(row)), None)


def _seconds(row: Row) -> float:
    assert row.step_s_median is not None
    return row.step_s_median


def _cell(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
