"""What a training run leaves to be read: log lines, metrics.jsonl, and tensorboard's scalars and
pictures.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.events import Events
from engine.validation import BY_CLASSIFIER, ValidationRow
from utils.atomic import write_text
from utils.metrics import json_number
from utils.run_metrics import (
    METRICS_NAME,
    has_validation,
    is_validation,
    parse_row,
    read_rows,
    validation_name,
)

# Above this share of waiting for data, the log says what helps.
_MUCH_DATA = 0.5

logger = logging.getLogger(__name__)


class Recorder:
    """Averages what iterations report and writes it out.

    Args:
        folder: of the run; None on ranks that write nothing (they still average).
        start: iterations done before; what the files hold of later ones is dropped.
        end: the last iteration, for the time that is left.
        batch_size: over all ranks.
        validated_on: see `engine.validation`; the summary leaves out figures of others.
        means: what :meth:`means_so_far` gave to the checkpoint that is resumed, if any.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        start: int,
        end: int,
        batch_size: int,
        validated_on: str,
        means: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._start = start
        self._end = end
        self._batch_size = batch_size
        self._validated_on = validated_on
        self._events: Events | None = None
        self._sums: dict[str, Tensor] = dict(means["sums"]) if means else {}
        self._count = 0
        self._averaged: int = means["averaged"] if means else 0
        self._data_s = 0.0
        self._lr = 0.0
        self._since = time.monotonic()
        self._hinted = False

    def __enter__(self) -> "Recorder":
        if self._folder is not None:
            _trim(self._folder / METRICS_NAME, self._start)
            self._events = Events(self._folder, purge_step=self._start + 1)
        self._since = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()

    def add(self, losses: dict[str, Tensor], lr: float, data_s: float) -> None:
        """Note one iteration and how long this rank's data took; nothing is read from the device.

        `losses` are empty where the update was left out: it counts as time, but not as a value.
        """
        if losses and self._sums.keys() - losses.keys():
            # Of before a resume, and of another objective.
            self.restart()
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self._averaged += bool(losses)
        self._data_s += data_s
        self._lr = lr

    def restart(self) -> None:
        """Leave out what was noted so far of the next means: another loss has another unit."""
        self._sums, self._averaged = {}, 0

    def means_so_far(self) -> dict[str, Any]:
        """What a resumed run needs, so that its next line is that of an undisturbed one."""
        # Copies: a value may be a part of a vector with all gradients.
        sums = {name: value.detach().cpu().clone() for name, value in self._sums.items()}
        return {"sums": sums, "averaged": self._averaged}

    def flush(self, iteration: int) -> str:
        """Write the means since the last call; returns them in short, for a progress bar."""
        means = {name: value.item() / self._averaged for name, value in self._sums.items()}
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._count / seconds
        share = self._data_s / seconds
        left = timedelta(seconds=round((self._end - iteration) / rate))
        values = {
            **means,
            "lr": self._lr,
            "iterations_per_s": rate,
            "images_per_s": rate * self._batch_size,
            "data_share": share,
        }
        short = ", ".join(f"{name} {value:.4g}" for name, value in means.items()) or "no update"
        text = (
            f"iteration {iteration}/{self._end}: {short}, lr {self._lr:.3g}, {rate:.3g} it/s, "
            f"{rate * self._batch_size:.3g} images/s, data {100 * share:.0f} %, ETA {left}"
        )
        self._write(iteration, {"kind": "train"}, values, "train", text)
        if share > _MUCH_DATA and not self._hinted and self._folder is not None:
            self._hinted = True
            logger.info(
                "most of the time goes into loading data: raise `train_dataset.num_workers`, or "
                "set `train_dataset.dataset.args.cache: device`"
            )
        self._sums, self._count, self._averaged = {}, 0, 0
        self._data_s, self._since = 0.0, time.monotonic()
        return f"{short}, {rate * self._batch_size:.3g} images/s"

    def validation(
        self, iteration: int, results: Sequence[tuple[float, Sequence[ValidationRow]]]
    ) -> None:
        """Write validation figures."""
        for scale, rows in results:
            for row in rows:
                values = {
                    "psnr": row.psnr,
                    "gflops_paper": row.gflops,
                    "heavy_share": row.heavy_share,
                }
                text = (
                    f"iteration {iteration}/{self._end}: validation x{scale:g} {row.name}: "
                    f"{row.psnr:.3f} dB, {row.gflops:.2f} GFLOPs (paper)"
                )
                if row.name == BY_CLASSIFIER:  # else all, or there is nothing to choose from
                    text += f", {100 * row.heavy_share:.1f} % heavy"
                key = {
                    **{"kind": "valid", "scale": scale, "name": row.name},
                    "validated_on": self._validated_on,
                }
                tag = f"valid_x{scale:g}_{row.name}"
                self._write(iteration, key, values, tag, text)
                if self._events is not None and row.picture is not None:
                    self._events.add_image(tag, row.picture, iteration)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of what is done inside does not count as training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def summary(self) -> str:
        """Log and return the best and the last validation figures, parts before a resume included.

        One line for each set and way of running the model; empty where nothing was validated, and
        on ranks that write nothing.
        """
        if self._folder is None or not (self._folder / METRICS_NAME).is_file():
            return ""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(self._folder / METRICS_NAME)[0]:
            # Earlier rows do not say on what.
            is_comparable = row.get("validated_on", self._validated_on) == self._validated_on
            if is_validation(row) and row.get("psnr") is not None and is_comparable:
                by_name.setdefault(validation_name(row), []).append(row)
        lines = []
        for name, rows in by_name.items():
            best, last = max(rows, key=lambda row: row["psnr"]), rows[-1]
            lines.append(
                f"validation {name}: best {best['psnr']:.3f} dB at iteration {best['iteration']}, "
                f"last {last['psnr']:.3f} dB at iteration {last['iteration']}"
            )
        for line in lines:
            logger.info("%s", line)
        return "\n".join(lines)

    def has_validation(self, iteration: int) -> bool:
        """Whether the folder holds validation figures of `iteration`; False on other ranks."""
        return self._folder is not None and has_validation(self._folder / METRICS_NAME, iteration)

    def _write(
        self, iteration: int, key: dict[str, Any], values: dict[str, float], tag: str, text: str
    ) -> None:
        if self._folder is None or self._events is None:
            return
        logger.info("%s", text)
        for name, value in values.items():
            self._events.add_scalar(f"{tag}/{name}", value, iteration)
        numbers = {name: json_number(value) for name, value in values.items()}
        row = json.dumps({"iteration": iteration, **key, **numbers})
        with (self._folder / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(f"{row}\n")


def _trim(path: Path, last: int) -> None:
    """Drop the rows of iterations after `last`, which will come again, and broken rows."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    kept = [line for line in lines if (row := parse_row(line)) and row["iteration"] <= last]
    # A last row without its end would be spoilt by the next one.
    if kept != lines or not text.endswith("\n"):
        write_text(path, "".join(f"{line}\n" for line in kept))
