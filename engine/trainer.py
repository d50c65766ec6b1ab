"""The training loop that originals and both PCSR phases share."""

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import models
from engine.data import Batch, to_device, train_batches, validation_sets
from engine.gradients import BatchGradients
from engine.objectives import make_objective
from engine.optim import OPTIMIZERS, SCHEDULERS, load_optimizer
from engine.recorder import Recorder
from engine.run_folder import open_folder
from engine.start import Start, TrainOptions, find_start
from engine.stop import StopSignal
from engine.train_checks import check_model, check_scale, required_sections
from engine.validation import ValidationRow, validate
from utils.checkpoint import LAST_NAME, load_phase0, load_weights, save_checkpoint
from utils.config import Config
from utils.distributed import (
    World,
    broadcast_state,
    fail_together,
    max_over_ranks,
    on_main,
    together,
)
from utils.errors import UserError

logger = logging.getLogger(__name__)


def train(config: Config, options: TrainOptions, world: World) -> int:
    """Train `config`, resuming as `options` say.

    Returns:
        the exit code: 0, or 128 + N after signal N.

    Raises:
        UserError: anything that the user can put right.
    """
    start = on_main(lambda: find_start(config, options))
    if start.iteration >= config.iter_max > 0:
        logger.info("nothing to do: finished at iteration %d", start.iteration)
        return 0
    return Trainer(config, options, world, start).run()


class Trainer:
    """Trains one config in one folder; see :func:`train`."""

    def __init__(self, config: Config, options: TrainOptions, world: World, start: Start) -> None:
        self.config = config
        self.options = options
        self.world = world
        self.start = start
        self.last_path = options.save_dir / LAST_NAME
        self._saved_at = 0.0
        together(self._build)
        broadcast_state(self.model)

    def run(self) -> int:
        """Train to `iter_max`. Returns the exit code."""
        together(lambda: self._open_folder() if self.world.is_main else None)
        # No checkpoint yet: one without any training would stand in for released weights.
        self._saved_at = time.monotonic()
        with (
            StopSignal() as stop,
            self.gradients,
            self._recorder() as recorder,
            self._progress() as bar,
        ):
            return self._loop(stop, recorder, bar)

    def _build(self) -> None:
        """Everything that a wrong config can break."""
        config, start = self.config, self.start
        data, optimizer_spec = required_sections(config)
        self.data = data
        torch.manual_seed(start.seed)
        self.model = models.make(config.model, data_norm=config.data_norm)
        check_model(config, self.model)
        self.model.to(self.world.device).train()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._build_optimiser(optimizer_spec)
        if start.checkpoint is not None and start.path is not None:
            self._load(start.checkpoint, start.path)
        self.batches = train_batches(
            data, seed=start.seed, start=start.iteration, stop=config.iter_max, world=self.world
        )
        self.validation: list[tuple[float, Dataset]] = []
        if config.valid_dataset is not None:
            self.validation = validation_sets(config.valid_dataset)

    def _build_optimiser(self, optimizer_spec: dict[str, Any]) -> None:
        config = self.config
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = BatchGradients(
            make_objective(
                self.model,
                loss_rgb_w=config.loss_rgb_w,
                loss_avg_w=config.loss_avg_w,
                routing_loss=config.routing_loss,
            ),
            trained,
            world=self.world,
            batch_size=self.data.batch_size,
            microbatches=config.microbatches,
            precision=config.precision,
        )
        scheduler_spec = config.lr_scheduler or {
            "name": "CosineAnnealingLR_Restart",
            "args": {"T_period": [config.iter_max], "eta_min": 1e-7},
        }
        self.specs = {"optimizer": optimizer_spec, "lr_scheduler": scheduler_spec}
        self.optimizer = OPTIMIZERS.make(optimizer_spec, "optimizer", params=trained)
        self.scheduler = SCHEDULERS.make(scheduler_spec, "lr_scheduler", optimizer=self.optimizer)

    # The loop

    def _loop(self, stop: StopSignal, recorder: Recorder, bar: tqdm) -> int:
        config, end = self.config, self.config.iter_max
        for step in range(self.start.iteration, end):
            began = time.monotonic()
            batch, signal_number, overdue = self._next_batch(stop.number)
            waited_s = time.monotonic() - began
            # Never untrained weights: in their place, released ones are taken.
            if step > 0 and (signal_number or overdue):
                self._save(step)
            if signal_number:
                where = f"saved at iteration {step}" if step else "before the first iteration"
                logger.info("stopped by signal %d: %s", signal_number, where)
                return 128 + signal_number
            losses = self._iterate(step, batch)
            done = step + 1
            printing = _is_due(done, config.iter_print, end)
            validating = bool(self.validation) and _is_due(done, config.iter_val, end)
            # Before a validation, too: it may take longer than who ends the run will wait.
            saving = validating or _is_due(done, config.iter_save, end)
            if printing or saving or self.world.device.type == "cpu":
                self._check_finite(losses, done)
            recorder.add(losses, self.optimizer.param_groups[0]["lr"], waited_s)
            bar.update()
            if printing:
                bar.set_postfix_str(recorder.flush(done))
            if saving:
                self._save(done)
            if validating:
                recorder.validation(done, self._validate())
        logger.info("finished at iteration %d: %s", end, self.last_path)
        return 0

    def _next_batch(self, signal_number: int) -> tuple[Batch, int, bool]:
        """The next batch on the device, and what the ranks agree on before they compute it.

        Returns:
            the batch; the signal that any rank got, else 0; whether to save now.

        Raises:
            UserError: the data of any rank cannot be read.
        """
        batch: Batch = {}
        problem = None
        try:
            batch = next(self.batches)
            check_scale(self.model, batch)
            batch = to_device(batch, self.world.device)
        except UserError as error:
            problem = str(error)
        limit_s = self.config.iter_save_s
        # Rank 0 writes, so its clock counts.
        overdue = limit_s is not None and time.monotonic() - self._saved_at >= limit_s
        failed, signal_number, saving = max_over_ranks(
            [int(problem is not None), signal_number, int(overdue and self.world.is_main)]
        )
        if failed:
            fail_together(problem)
        return batch, signal_number, bool(saving)

    def _iterate(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One iteration; returns its losses, means over all ranks."""
        lr = batch["lr"]
        if self.config.channels_last:
            lr = lr.contiguous(memory_format=torch.channels_last)
        self.scheduler.set_step(step)
        losses = self.gradients(lr, batch["hr"])
        self.optimizer.step()
        return losses

    def _validate(self) -> list[tuple[float, list[ValidationRow]]]:
        with self.gradients.all_threads():
            return validate(
                self.model,
                self.validation,
                psnr_type=self.config.psnr_type,  # type: ignore[arg-type]
                world=self.world,
            )

    def _check_finite(self, losses: dict[str, Tensor], done: int) -> None:
        # All ranks see the same losses, so all come to the same end.
        bad = [name for name, value in losses.items() if not math.isfinite(value.item())]
        if bad:
            fail_together(self._divergence(bad[0], done))

    def _divergence(self, what: str, done: int) -> str:
        kept = "no checkpoint was written yet"
        if self.last_path.is_file():
            kept = f"the last good checkpoint is kept, {self.last_path}"
        return (
            f"training diverged: {what} is not finite at iteration {done} (seed "
            f"{self.start.seed}); {kept}: lower `optimizer.args.lr` and run again"
        )

    # The checkpoint

    def _save(self, done: int) -> None:
        together(lambda: self._write_checkpoint(done) if self.world.is_main else None)
        self._saved_at = time.monotonic()

    def _write_checkpoint(self, done: int) -> None:
        states = {
            "model": (self.config.model, self.model.state_dict()),
            "optimizer": (self.specs["optimizer"], self.optimizer.state_dict()),
            "lr_scheduler": (self.specs["lr_scheduler"], self.scheduler.state_dict()),
        }
        for name, tensor in states["model"][1].items():
            if not bool(tensor.isfinite().all()):
                raise UserError(self._divergence(name, done))
        content = {
            key: {"name": spec["name"], "args": dict(spec.get("args") or {}), "sd": state}
            for key, (spec, state) in states.items()
        }
        rng = torch.get_rng_state()
        save_checkpoint(
            self.last_path, {**content, "iter": done, "seed": self.start.seed, "rng": rng}
        )

    def _load(self, checkpoint: dict[str, Any], path: Path) -> None:
        if not self.start.resumes:
            load_phase0(self.model, checkpoint["model"]["sd"], path)
            return
        load_weights(self.model, checkpoint["model"]["sd"], path)
        load_optimizer(self.optimizer, checkpoint["optimizer"]["sd"], path)
        self.scheduler.set_step(self.start.iteration)
        if isinstance(checkpoint.get("rng"), Tensor):
            torch.set_rng_state(checkpoint["rng"])

    # What one sees

    def _open_folder(self) -> None:
        open_folder(self.options.save_dir, self.config, self.start)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "%s on %s x %d, %s, seed %d: %.2fK parameters, %.2fK trained, iterations %d to %d",
            self.config.name,
            self.world.device,
            self.world.size,
            self.config.precision,
            self.start.seed,
            total / 1e3,
            trained / 1e3,
            self.start.iteration,
            self.config.iter_max,
        )

    def _progress(self) -> tqdm:
        return tqdm(
            initial=self.start.iteration,
            total=self.config.iter_max,
            desc=self.config.name,
            unit="it",
            dynamic_ncols=True,
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )

    def _recorder(self) -> Recorder:
        return Recorder(
            self.options.save_dir if self.world.is_main else None,
            start=self.start.iteration,
            end=self.config.iter_max,
            batch_size=self.data.batch_size,
        )


def _is_due(done: int, every: int, end: int) -> bool:
    """True after each `every` iterations (0: never), and at the end."""
    return done == end or (every > 0 and done % every == 0)
