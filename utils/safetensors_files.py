"""Weights in the safetensors format, which holds tensors and a few words, and cannot hold code.

What our checkpoints have beside the tensors goes into the file's metadata: ``model`` is the spec
as JSON, ``iter`` a number.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import UserError

SUFFIX = ".safetensors"


def is_safetensors(path: Path) -> bool:
    """Whether the file's name says so."""
    return path.suffix.lower() == SUFFIX


def check_safetensors() -> None:
    """Refuse where the package is missing.

    Raises:
        UserError: it is.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise UserError(f"{SUFFIX} files need one more package: pip install safetensors")


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, or the bare state dict of a file without our metadata.

    Raises:
        safetensors.SafetensorError, ValueError: it is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "model" not in about:
        return state
    return {"model": {**json.loads(about["model"]), "sd": state}, "iter": int(about["iter"])}


def to_bytes(checkpoint: Mapping[str, Any]) -> bytes:
    """A file's content.

    Args:
        checkpoint: ``{"model": {"name", "args", "sd"}, "iter"}``; what else it has is left out.
    """
    from safetensors.torch import save

    spec = {key: value for key, value in checkpoint["model"].items() if key != "sd"}
    about = {"format": "pt", "model": json.dumps(spec), "iter": str(checkpoint.get("iter", 0))}
    state = {key: value.contiguous() for key, value in checkpoint["model"]["sd"].items()}
    return save(state, about)
