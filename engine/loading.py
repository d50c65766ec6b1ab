"""Models for inference from their checkpoints, checked."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

import models
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from utils.checkpoint import (
    NORM_KEYS,
    build_model,
    check_same_model,
    find_weights,
    load_checkpoint,
    same_norm,
)
from utils.config import Config
from utils.errors import UserError

_log = logging.getLogger(__name__)


def weights_of(config: Config, named: Path | None = None) -> Path:
    """The checkpoint that is `named`, else that of the config's run in save/.

    Raises:
        UserError: there is none.
    """
    return named or find_weights(Path("save") / config.name)


def load_model(path: Path, device: torch.device, config: Config | None = None) -> nn.Module:
    """Build a checkpoint's model with its weights, in eval mode on `device`.

    Args:
        config: where given, the checkpoint must be of its model (a PCSR checkpoint may be of
            either phase), and its `data_norm` serves checkpoints that hold none.

    Raises:
        UserError: see `utils.checkpoint`.
    """
    checkpoint = load_checkpoint(path)
    data_norm = None
    asked: dict[str, Tensor] = {}
    if config is not None:
        # Built to be checked: the checkpoint's spec would hide a misspelt argument.
        asked = models.make(config.model, data_norm=config.data_norm).state_dict()
        check_same_model(config.model, checkpoint["model"], path)
        data_norm = config.data_norm
        if "name" not in checkpoint["model"]:
            checkpoint["model"] = {**config.model, "sd": checkpoint["model"]["sd"]}
    model = build_model(checkpoint, path, data_norm)
    if data_norm is not None:
        held = model.state_dict()
        both = [key for key in NORM_KEYS if key in asked and key in held]
        if not all(same_norm(asked[key], held[key]) for key in both):
            _log.warning("the config's `data_norm` is not used: %s holds mean and std", path)
    return model.to(device)


def load_original(path: Path, device: torch.device, config: Config | None = None) -> SRNetwork:
    """:func:`load_model` for original networks; UserError where it is not one."""
    model = load_model(path, device, config)
    if not isinstance(model, SRNetwork) or model.no_upsampling:
        raise UserError(f"checkpoint {path} is not an original super-resolution network")
    return model


def load_pcsr(path: Path, device: torch.device, config: Config | None = None) -> PCSR:
    """:func:`load_model` for PCSR models of any phase; UserError where it is not one."""
    model = load_model(path, device, config)
    if not isinstance(model, PCSR):
        raise UserError(f"checkpoint {path} is not a PCSR model")
    return model
