"""What a config must hold to be trained, beyond what every config must."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from utils.config import Config, DataConfig
from utils.errors import UserError


def required_sections(config: Config) -> tuple[DataConfig, dict[str, Any]]:
    """The training data and the optimizer's spec.

    Raises:
        UserError: they are missing, or there is nothing to do.
    """
    if config.train_dataset is None:
        raise UserError("config: key `train_dataset` is missing")
    if config.optimizer is None:
        raise UserError("config: key `optimizer` is missing")
    if config.iter_max < 1:
        raise UserError("config: key `iter_max` is missing, or 0: how many iterations to train")
    return config.train_dataset, config.optimizer


def check_model(config: Config, model: nn.Module) -> None:
    """Refuse a model that `phase` or `scale` do not fit.

    Raises:
        UserError: naming the key.
    """
    name = config.model["name"]
    if config.phase is None:
        if not isinstance(model, SRNetwork) or model.no_upsampling:
            raise UserError(
                f"config: `model` is `{name}`, which is no original network; these are backbones "
                f"with `no_upsampling: false`"
            )
        if config.scale is not None and config.scale != model.scale:
            raise UserError(
                f"config: `scale` is {config.scale}, but the model is built for {model.scale}"
            )
        return
    if not isinstance(model, PCSR):
        raise UserError(f"config: `phase` is {config.phase}, but `model` is `{name}`, not PCSR")
    if (config.phase == 1) != (model.classifier is not None):
        has = "has a" if model.classifier is not None else "has no"
        raise UserError(
            f"config: `phase` is {config.phase}, but `model`, `{name}`, {has} classifier "
            f"(phase 0 trains without one, phase 1 with one)"
        )


def check_validation_scales(model: nn.Module, scales: Iterable[float]) -> None:
    """Refuse scales to validate at that are not that of an original network.

    Args:
        scales: 0 where pairs on disk decide.

    Raises:
        UserError: naming both.
    """
    if not isinstance(model, SRNetwork):
        return
    for scale in scales:
        if scale not in (0, model.scale):
            raise UserError(
                f"config: the model enlarges {model.scale} times, but is to be validated at scale "
                f"{scale:g}: see `valid_dataset`"
            )


def check_compile(config: Config, processes: int) -> None:
    """Refuse to compile an objective whose parts share sums, over threads, rounds or processes.

    Raises:
        UserError: both are asked for.
    """
    if config.compile == "none":
        return
    others = {"microbatches": config.microbatches or 1, "accumulate": config.accumulate}
    for key, count in others.items():
        if count > 1:
            raise UserError(
                f"config: `compile` and `{key}` do not go together: leave one of them out"
            )
    if processes > 1:
        raise UserError("config: `compile` is for one process: leave it out to train on several")


def check_scale(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Refuse samples whose scale is not that of an original network.

    Args:
        batch: ``{"lr": (B, 3, h, w), "hr": (B, 3, H, W)}``.

    Raises:
        UserError: naming both.
    """
    if not isinstance(model, SRNetwork):
        return
    (h, w), (height, width) = batch["lr"].shape[-2:], batch["hr"].shape[-2:]
    if (height, width) != (model.scale * h, model.scale * w):
        raise UserError(
            f"config: the model enlarges {model.scale} times, but the training data's scale is "
            f"{height / h:g}: see `train_dataset`"
        )
