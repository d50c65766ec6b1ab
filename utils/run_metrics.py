"""What a run leaves in metrics.jsonl: a JSON object on each line."""

import json
import math
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


def parse_row(line: str) -> dict[str, Any] | None:
    """A line as its object; None where it is broken, or without a kind and a finite iteration."""
    try:
        row = json.loads(line)
        is_good = isinstance(row["kind"], str) and math.isfinite(row["iteration"])
    except (ValueError, KeyError, TypeError):
        return None
    return row if is_good else None


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file, and how many of its lines are broken.

    Raises:
        OSError: no such file, or it cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [parse_row(line) for line in lines]
    good = [row for row in rows if row is not None]
    return good, len(rows) - len(good)


def has_validation(path: Path, iteration: int) -> bool:
    """Whether a file holds validation figures of `iteration`; False where there is no file."""
    rows = read_rows(path)[0] if path.is_file() else []
    return any(row["iteration"] == iteration and is_validation(row) for row in rows)


def is_validation(row: dict[str, Any]) -> bool:
    """Whether a row is of a validation."""
    return row["kind"].startswith("valid")


def validation_name(row: dict[str, Any]) -> str:
    """What a validation row is of, such as ``x4 k0``."""
    if "name" in row:
        return f"x{row.get('scale', 0):g} {row['name']}"
    # As rows were written at first: the kind is `valid_x4_k0`.
    return row["kind"].removeprefix("valid_").replace("_", " ")
