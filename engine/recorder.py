"""What a training run leaves to be read: log lines, metrics.jsonl and tensorboard scalars."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from torch import Tensor

from engine.validation import ValidationRow

logger = logging.getLogger(__name__)


class Recorder:
    """Averages what iterations report and writes it out.

    Args:
        folder: of the run; None on ranks that write nothing (they still average).
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._lr = 0.0
        self._since = time.monotonic()

    def __enter__(self) -> "Recorder":
        if self._folder is not None:
            self._writer = SummaryWriter(str(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, losses: dict[str, Tensor], lr: float) -> None:
        """Note one iteration; nothing is read from the device yet."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._lr = lr

    def flush(self, iteration: int) -> dict[str, float]:
        """Write the means since the last call, and return them."""
        seconds = time.monotonic() - self._since
        means = {name: value.item() / self._count for name, value in self._sums.items()}
        values = {**means, "lr": self._lr, "iterations_per_s": self._count / seconds}
        self._sums, self._count, self._since = {}, 0, time.monotonic()
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._write(iteration, "train", values, f"iteration {iteration}: {text}")
        return means

    def validation(self, iteration: int, results: list[tuple[float, list[ValidationRow]]]) -> None:
        """Write validation figures; the time they took does not count as training."""
        for scale, rows in results:
            for row in rows:
                values = {
                    "psnr": row.psnr,
                    "gflops_paper": row.gflops,
                    "heavy_share": row.heavy_share,
                }
                text = (
                    f"iteration {iteration}: validation x{scale:g} {row.name}: "
                    f"{row.psnr:.3f} dB, {row.gflops:.2f} GFLOPs (paper), "
                    f"{100 * row.heavy_share:.1f} % heavy"
                )
                self._write(iteration, f"valid_x{scale:g}_{row.name}", values, text)
        self._since = time.monotonic()

    def _write(self, iteration: int, kind: str, values: dict[str, float], text: str) -> None:
        if self._folder is None or self._writer is None:
            return
        logger.info("%s", text)
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, iteration)
        row: dict[str, Any] = {"iteration": iteration, "kind": kind, **values}
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
