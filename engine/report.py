"""What an evaluation leaves to be read: a table on standard output, and a JSON file."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from engine.conventions import Conventions
from engine.evaluation import Figures, mean_of
from utils.atomic import write_text
from utils.distributed import World
from utils.machine import describe
from utils.psnr_conventions import LEGEND, NAMES, Psnrs

T = TypeVar("T")

_QUALITY = ("name", "psnr", "ssim", "psnr_by_convention")


class Table:
    """An aligned table, written row by row as the images are done.

    Args:
        names: of all rows, so that the first column is wide enough.
        upsamplers: how many share columns there are; one upsampler, or none, needs none.
        write: takes a line.
    """

    def __init__(
        self, names: Sequence[str], upsamplers: int, write: Callable[[str], None] = print
    ) -> None:
        titles = ["PSNR dB", "SSIM", "GFLOPs paper", "GFLOPs executed"]
        self.titles = ["image", *titles, *_share_titles(upsamplers), "time s"]
        self.widths = [max(map(len, [*names, "image", "bicubic"]))]
        self.widths += [max(8, len(title)) for title in self.titles[1:]]
        self.write = write

    def header(self) -> None:
        """Column titles, and a line below them."""
        self._line(self.titles)
        self.rule()

    def rule(self) -> None:
        """A line across the table."""
        self.write("-" * (sum(self.widths) + 2 * (len(self.widths) - 1)))

    def row(self, figures: Figures) -> None:
        """One image, or the mean."""
        flops = [f"{n / 1e9:.4f}" for n in (figures.flops_paper, figures.flops_executed)]
        shares = [f"{100 * share:.2f}" for share in figures.shares]
        if len(shares) < 2:
            shares = []
        self._line([*_quality(figures), *flops, *shares, f"{figures.time_s:.3f}"])

    def baseline(self, name: str, figures: Figures) -> None:
        """A method of which only the quality counts."""
        self._line([name, *_quality(figures)[1:]])

    def _line(self, cells: Iterable[str]) -> None:
        first, *others = cells
        padded = [f"{cell:>{width}}" for cell, width in zip(others, self.widths[1:], strict=False)]
        self.write("  ".join([f"{first:<{self.widths[0]}}", *padded]))


def psnr_table(psnrs: Mapping[str, Psnrs | None]) -> str:
    """Mean PSNR by convention, in lines: channels downwards, borders across.

    Args:
        psnrs: by what they are of; None counts for nothing.
    """
    title = "mean PSNR dB"
    first_width = max(len(title), *(2 + len(name) for name in NAMES))
    lines: list[str] = []
    for subject, rows in psnrs.items():
        if rows is None:
            continue
        if not lines:
            borders = [f"border {px:>2}" for px in rows["rgb"]]
            lines.append("  ".join([f"{title:<{first_width}}", *borders]))
        lines.append(subject)
        for name, row in rows.items():
            cells = ["-" if math.isnan(dB) else f"{dB:.3f}" for dB in row.values()]
            padded = [f"{cell:>{len('border 99')}}" for cell in cells]
            lines.append("  ".join([f"{'  ' + name:<{first_width}}", *padded]))
    return "\n".join([*lines, *LEGEND])


def followed(rows: Iterable[T], total: int, world: World) -> Iterable[T]:
    """`rows` with a progress bar by rank 0, where somebody watches."""
    return tqdm(
        rows,
        total=total,
        unit="image",
        dynamic_ncols=True,
        leave=False,
        disable=not (world.is_main and sys.stderr.isatty()),
    )


def foot(conventions: Conventions, world: World, peak_memory_bytes: int | None) -> str:
    """What the figures above depend on, in a few lines."""
    facts = describe(world.device)
    processes = f"{world.size} processes with " if world.size > 1 else ""
    peak = "unknown" if peak_memory_bytes is None else f"{peak_memory_bytes / 2**20:.0f} MiB"
    return "\n".join(
        [
            f"conventions: {conventions.describe()}",
            "GFLOPs: 2 per multiply-add; paper: as the published tables count, executed: as run",
            f"peak memory {peak}; {facts['device_name']} ({facts['device']}, "
            f"{processes}{facts['torch_threads']} threads), torch {facts['torch']}",
        ]
    )


def to_json(figures: Sequence[Figures], baseline: Sequence[Figures]) -> dict[str, Any]:
    """All figures as plain numbers: FLOPs not in G, times in seconds.

    None (JSON's null) stands for the infinite PSNR of equal images, and for the SSIM of images
    smaller than its window. `baseline`, where not empty, are figures of bicubic enlargement.
    """
    content = _images_and_mean(figures, list(figures[0].to_json()))
    if baseline:
        keys = [key for key in baseline[0].to_json() if key in _QUALITY]
        content["bicubic"] = _images_and_mean(baseline, keys)
    return content


def circumstances(
    conventions: Conventions, world: World, peak_memory_bytes: int | None
) -> dict[str, Any]:
    """What figures depend on, and what they took, in plain values."""
    return {
        "conventions": conventions.to_json(),
        "machine": describe(world.device),
        "processes": world.size,
        "peak_memory_bytes": peak_memory_bytes,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one go: an older one stays whole until then."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _images_and_mean(figures: Sequence[Figures], keys: Sequence[str]) -> dict[str, Any]:
    images = [{key: f.to_json()[key] for key in keys} for f in figures]
    mean = mean_of(figures).to_json()
    return {"images": images, "mean": {key: mean[key] for key in keys if key != "name"}}


def _share_titles(upsamplers: int) -> list[str]:
    if upsamplers == 2:
        return ["light %", "heavy %"]
    return [f"#{index} %" for index in range(upsamplers)] if upsamplers > 2 else []


def _quality(figures: Figures) -> list[str]:
    ssim = "-" if math.isnan(figures.ssim) else f"{figures.ssim:.4f}"
    return [figures.name, f"{figures.psnr:.3f}", ssim]
