"""Models, assembled from ``{name, args}`` specs by :func:`make`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

# Importing a model file registers it.
from models import pcsr, sampler
from models.backbones import carn, fsrcnn, rcan, srresnet
from models.registry import MODELS

__all__ = ["MODELS", "carn", "fsrcnn", "make", "names", "pcsr", "rcan", "sampler", "srresnet"]


def make(spec: Mapping[str, Any], where: str = "model", **runtime: Any) -> nn.Module:
    """Build the model that `spec` = ``{name, args}`` describes; see :meth:`Registry.make`.

    Args:
        runtime: what is not part of the spec; `data_norm` = ``{mean, std}`` (RGB in [0, 1])
            replaces the backbone's default normalisation.
    """
    return MODELS.make(spec, where, **runtime)


def names() -> list[str]:
    """Names of all registered models, sorted."""
    return MODELS.names()
