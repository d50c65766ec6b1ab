"""All that training changes: weights, their average, optimiser, schedule; and its checkpoint."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.ema import Ema
from engine.optim import OPTIMIZERS, SCHEDULERS, WarmUp, load_optimizer
from engine.start import Start
from utils.checkpoint import check_same_norm, load_phase0, load_weights, weights_for_inference
from utils.config import Config

logger = logging.getLogger(__name__)


def scheduler_spec_of(config: Config) -> Mapping[str, Any]:
    """The config's schedule; where it has none, one cosine over all iterations."""
    return config.lr_scheduler or {
        "name": "CosineAnnealingLR_Restart",
        "args": {"T_period": [config.iter_max], "eta_min": 1e-7},
    }


class TrainState:
    """A model in training, with everything that must be saved to continue as if nothing happened.

    Args:
        config: what to train and how.
        model: on its device; where a `start` has weights, it gets them.
        optimizer_spec: the config's.
        start: where training begins.

    Attributes:
        model, optimizer: torch's.
        trained: the parameters that are trained.
        ema: the average of the weights; None where the config wants none.
        skipped: updates that were left out in a row, up to now.

    Raises:
        UserError: the config's optimizer or schedule, or a checkpoint that does not fit.
    """

    def __init__(
        self, config: Config, model: nn.Module, optimizer_spec: Mapping[str, Any], start: Start
    ) -> None:
        self.model = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.skipped = 0
        self._config = config
        self._seed = start.seed
        scheduler_spec = scheduler_spec_of(config)
        self._specs = {"optimizer": optimizer_spec, "lr_scheduler": scheduler_spec}
        self.optimizer = OPTIMIZERS.make(optimizer_spec, "optimizer", params=self.trained)
        scheduler = SCHEDULERS.make(scheduler_spec, "lr_scheduler", optimizer=self.optimizer)
        self._scheduler = WarmUp(scheduler, config.warmup) if config.warmup else scheduler
        self.ema = Ema(model, config.ema) if config.ema is not None else None
        if start.checkpoint is not None and start.path is not None:
            self._load(start, start.checkpoint, start.path)

    @property
    def lr(self) -> float:
        """The learning rate that is set."""
        return self.optimizer.param_groups[0]["lr"]

    def set_step(self, step: int) -> None:
        """Set the learning rate of iteration `step`, counted from 0."""
        self._scheduler.set_step(step)

    def update(self, done: int) -> None:
        """Move the weights along their gradients; with it, `done` iterations are done."""
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(done)
        self.skipped = 0

    def jumping(self) -> contextlib.AbstractContextManager[None]:
        """Entered where something else than the optimizer changes weights: no average with old."""
        return contextlib.nullcontext() if self.ema is None else self.ema.jumping()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The weights to judge: the model has the averages while entered, where there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    def buffers(self) -> list[Tensor]:
        """Copies of what a forward pass changes: statistics of batch norm."""
        return [buffer.clone() for buffer in self.model.buffers()]

    def restore_buffers(self, saved: list[Tensor]) -> None:
        """Undo a forward pass; `saved` is from :meth:`buffers`."""
        for buffer, value in zip(self.model.buffers(), saved, strict=True):
            buffer.copy_(value)

    def content(self, done: int) -> dict[str, Any]:
        """The checkpoint after `done` iterations."""
        states = {
            "model": (self._config.model, self.model.state_dict()),
            "optimizer": (self._specs["optimizer"], self.optimizer.state_dict()),
            "lr_scheduler": (self._specs["lr_scheduler"], self._scheduler.state_dict()),
        }
        content: dict[str, Any] = {
            key: {"name": spec["name"], "args": dict(spec.get("args") or {}), "sd": state}
            for key, (spec, state) in states.items()
        }
        if self.ema is not None:
            content["ema"] = {"decay": self.ema.decay, "sd": self.ema.state_dict()}
        if self.skipped:
            content["skipped"] = self.skipped
        return {**content, "iter": done, "seed": self._seed, "rng": torch.get_rng_state()}

    def _load(self, start: Start, checkpoint: Mapping[str, Any], path: Path) -> None:
        if self._config.data_norm is not None:
            check_same_norm(self.model, checkpoint["model"]["sd"], path)
        if not start.resumes:
            load = load_weights if self._config.phase is None else load_phase0
            load(self.model, weights_for_inference(checkpoint), path)
            if self.ema is not None:
                self.ema.restart()
            return
        load_weights(self.model, checkpoint["model"]["sd"], path)
        load_optimizer(self.optimizer, checkpoint["optimizer"]["sd"], path)
        self._scheduler.set_step(start.iteration)
        self.skipped = int(checkpoint.get("skipped", 0))
        if self.ema is not None:
            self._load_ema(self.ema, checkpoint, path)
        elif "ema" in checkpoint:
            logger.warning(
                "%s holds averaged weights (`ema`), the config wants none: they are dropped", path
            )
        if isinstance(checkpoint.get("rng"), Tensor):
            torch.set_rng_state(checkpoint["rng"])

    def _load_ema(self, ema: Ema, checkpoint: Mapping[str, Any], path: Path) -> None:
        if "ema" in checkpoint:
            ema.load_state_dict(checkpoint["ema"]["sd"], path)
            return
        logger.info("%s holds no averaged weights (`ema`): the average begins here", path)
        ema.restart()
