"""Which models a demo runs: from checkpoints that are named, or from the configs' own folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.loading import load_original, load_pcsr, weights_of
from engine.restore import OriginalRestorer
from models.pcsr import PCSR
from utils.checkpoint import find_weights, load_checkpoint
from utils.config import load_config
from utils.errors import UserError

DEFAULT_CONFIG = Path("configs/carn-pcsr-phase1.yaml")


@dataclass(frozen=True)
class LoadedPcsr:
    """A PCSR model and what it is.

    Attributes:
        model: in eval mode, on its device.
        backbone: registry name of its encoder.
        path: its checkpoint.
    """

    model: PCSR
    backbone: str
    path: Path


def load_demo_pcsr(
    weights: Path | None, config_path: Path | None, overrides: Sequence[str], device: torch.device
) -> LoadedPcsr:
    """Load the PCSR model.

    A checkpoint holds its own spec, so `weights` alone is enough: no config is read then, and
    where the checkpoint holds no mean and std, its backbone's default applies. A config that is
    named beside it must be of the checkpoint's model, and its `data_norm` applies instead.

    Args:
        weights: checkpoint; None takes the config's.
        config_path: default :data:`DEFAULT_CONFIG` where there are no weights, or overrides.
        overrides: ``key.path=value`` for the config.

    Raises:
        UserError: missing weights, a checkpoint that is damaged, no PCSR model or not the config's.
    """
    config = None
    if weights is None or config_path is not None or overrides:
        config = load_config(config_path or DEFAULT_CONFIG, overrides)
    if weights is None:
        assert config is not None
        weights = weights_of(config)
    model = load_pcsr(weights, device, config)
    spec = load_checkpoint(weights)["model"]
    if "name" not in spec and config is not None:
        spec = config.model
    return LoadedPcsr(model, spec["args"]["encoder_spec"]["name"], weights)


def load_demo_original(
    weights: Path | None,
    config_path: Path | None,
    *,
    backbone: str,
    scale: float,
    device: torch.device,
) -> tuple[OriginalRestorer | None, str]:
    """Load the original network to compare with.

    Args:
        weights: checkpoint; None takes the config's.
        config_path: None takes that of the backbone's original at this scale, where there is one.
        backbone: registry name of the PCSR model's encoder.
        scale: that the comparison is made at.

    Returns:
        the network and its checkpoint's path, or None and why there is nothing to compare with: no
        original of this scale.

    Raises:
        UserError: weights that are named, or whose config is, cannot be used.
    """
    named = weights is not None or config_path is not None
    name = f"{backbone}-x{scale:g}"
    if config_path is None and weights is None and Path("configs", f"{name}.yaml").is_file():
        config_path = Path("configs", f"{name}.yaml")
    config = None if config_path is None else load_config(config_path)
    if weights is None:
        folder = Path("save") / (name if config is None else config.name)
        try:
            weights = find_weights(folder)
        except UserError as error:
            reason = f"no original at x{scale:g}: {folder} holds no weights"
            if named:
                raise UserError(f"{reason}; name a checkpoint with --original_weights") from error
            return None, f"{reason} (--original_weights names some)"
    model = load_original(weights, device, config)
    if model.scale != scale:
        return None, f"the original of {weights} works at x{model.scale}, not at x{scale:g}"
    return OriginalRestorer(model), str(weights)
