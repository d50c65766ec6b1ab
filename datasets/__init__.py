"""Image folders, pairs, LR images, sampling, and the scripts that prepare data.

`make` builds a source of images from a config's spec; `make_wrapper` builds on it what training
and evaluation take their ``{"lr", "hr"}`` samples from.
"""

from collections.abc import Mapping
from typing import Any

from datasets import folders, wrappers  # noqa: F401  (registers the names)
from datasets.registry import DATASETS, WRAPPERS

__all__ = ["DATASETS", "WRAPPERS", "make", "make_wrapper"]


def make(spec: Mapping[str, Any], where: str = "dataset") -> Any:
    """Build the data set that `spec`, ``{name, args}``, describes.

    Args:
        spec: never changed.
        where: path of the spec inside the config, for messages.

    Raises:
        UserError: unknown name or argument, or images that are missing or do not pair.
    """
    return DATASETS.make(spec, where)


def make_wrapper(
    spec: Mapping[str, Any], dataset: Any, where: str = "wrapper", **runtime: Any
) -> Any:
    """Build the wrapper that `spec` describes around `dataset`; errors as `make`."""
    return WRAPPERS.make(spec, where, dataset=dataset, **runtime)
