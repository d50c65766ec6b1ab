"""The training loop that originals and both PCSR phases share."""

import logging
import math
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import models
from engine.data import to_device, train_batches, validation_sets
from engine.objectives import autocast, make_objective
from engine.optim import OPTIMIZERS, SCHEDULERS
from engine.recorder import Recorder
from engine.validation import validate
from utils.atomic import write_text
from utils.checkpoint import (
    LAST_NAME,
    check_same_model,
    find_weights,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from utils.config import Config, dump_yaml
from utils.distributed import World, gather_objects, is_distributed, synchronise_batch_norm
from utils.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """What the command line decides.

    Attributes:
        save_dir: folder of the run.
        resume: "auto" (continue where `save_dir` stands), "never", or a checkpoint's path.
        init: phase 1: the phase 0 weights to start from; None for the config's.
    """

    save_dir: Path
    resume: str = "auto"
    init: str | None = None


class StopSignal:
    """Notes SIGINT and SIGTERM, so that the loop can end after the iteration it is in."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt  # asked twice: stop at once
        self.number = number


class Trainer:
    """Trains one config in one folder; see :func:`train`."""

    def __init__(self, config: Config, options: TrainOptions, world: World) -> None:
        self.config = config
        self.options = options
        self.world = world
        self.last_path = options.save_dir / LAST_NAME
        checkpoint = self._checkpoint_to_resume()
        self.start = int(checkpoint["iter"]) if checkpoint else 0
        self.seed = self._choose_seed(checkpoint)
        torch.manual_seed(self.seed)
        self.model = models.make(config.model, data_norm=config.data_norm)
        if checkpoint is None and config.phase == 1:
            self._load_phase0()
        self._build_engine()
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> int:
        """Train to `iter_max`. Returns the exit code: 0, or 128 + N after signal N."""
        config, end = self.config, self.config.iter_max
        if self.start >= end:
            logger.info("nothing to do: finished at iteration %d", self.start)
            return 0
        batches = self._batches()
        sets = validation_sets(config.valid_dataset) if config.valid_dataset else []
        self._announce()
        saved_at = time.monotonic()
        # A checkpoint from the start on: a full disk or a read-only folder shows at once.
        self._save(self.start)
        with StopSignal() as stop, self._progress() as bar, self._recorder() as recorder:
            for step in range(self.start, end):
                losses = self._iterate(step, next(batches))
                done = step + 1
                recorder.add(losses, self.optimizer.param_groups[0]["lr"])
                bar.update()
                number = self._agreed_stop(stop.number, done)
                if done % config.iter_print == 0 or done == end:
                    self._check_finite(recorder.flush(done), done)
                overdue = self._overdue(saved_at)
                if done % config.iter_save == 0 or done == end or number or overdue:
                    self._check_finite(losses, done)
                    self._save(done)
                    saved_at = time.monotonic()
                if number:
                    logger.info("stopped by signal %d: saved at iteration %d", number, done)
                    return 128 + number
                if sets and ((config.iter_val and done % config.iter_val == 0) or done == end):
                    recorder.validation(done, self._validate(sets))
        logger.info("finished at iteration %d: %s", end, self.last_path)
        return 0

    def _build_engine(self) -> None:
        config, device = self.config, self.world.device
        if self.world.size > 1:
            synchronise_batch_norm(self.model)
        self.model.to(device).train()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = make_objective(
            self.model, loss_rgb_w=config.loss_rgb_w, loss_avg_w=config.loss_avg_w
        )
        self.objective: nn.Module = objective
        if is_distributed():
            self.objective = DistributedDataParallel(objective, broadcast_buffers=False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if config.optimizer is None:
            raise UserError("config: key `optimizer` is missing")
        self.optimizer = OPTIMIZERS.make(config.optimizer, "optimizer", params=trained)
        spec = config.lr_scheduler or {
            "name": "CosineAnnealingLR_Restart",
            "args": {"T_period": [max(1, config.iter_max)], "eta_min": 1e-7},
        }
        self.scheduler_spec = spec
        self.scheduler = SCHEDULERS.make(spec, "lr_scheduler", optimizer=self.optimizer)

    def _iterate(self, step: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = to_device(batch, self.world.device)
        lr = batch["lr"]
        if self.config.channels_last:
            lr = lr.contiguous(memory_format=torch.channels_last)
        self.scheduler.set_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.world.device, self.config.precision):
            losses = self.objective(lr, batch["hr"])
        losses["loss"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        data = self.config.train_dataset
        if data is None:
            raise UserError("config: key `train_dataset` is missing")
        return train_batches(
            data, seed=self.seed, start=self.start, stop=self.config.iter_max, world=self.world
        )

    def _validate(self, sets: list) -> list:
        return validate(self.model, sets, psnr_type=self.config.psnr_type, world=self.world)

    def _agreed_stop(self, number: int | None, done: int) -> int:
        """The signal that any rank got; ranks agree at the same iteration."""
        if not is_distributed():
            return number or 0
        flag = torch.tensor(float(number or 0), device=self.world.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return int(flag.item())

    def _overdue(self, saved_at: float) -> bool:
        """True where `iter_save_s` has passed; with several ranks rank 0's clock decides.

        Only rank 0 writes, so the others need not agree.
        """
        limit = self.config.iter_save_s
        return limit is not None and time.monotonic() - saved_at >= limit

    def _check_finite(self, values: dict[str, Any], done: int) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(float(value))]
        if bad:
            raise UserError(
                f"training diverged: {bad[0]} is not finite at iteration {done} "
                f"(seed {self.seed}); the last good checkpoint is {self.last_path}: "
                f"lower `optimizer.args.lr` and run again"
            )

    # Checkpoints

    def _save(self, iteration: int) -> None:
        if not self.world.is_main:
            return
        content = {
            "model": self._spec(self.config.model, self.model.state_dict()),
            "optimizer": self._spec(self.config.optimizer or {}, self.optimizer.state_dict()),
            "lr_scheduler": self._spec(self.scheduler_spec, self.scheduler.state_dict()),
            "iter": iteration,
            "seed": self.seed,
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(self.last_path, content)

    @staticmethod
    def _spec(spec: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        return {"name": spec["name"], "args": dict(spec.get("args") or {}), "sd": state}

    def _checkpoint_to_resume(self) -> dict[str, Any] | None:
        resume = self.options.resume
        if resume == "auto":
            if not self.last_path.is_file():
                return None
            path = self.last_path
        elif resume == "never":
            self._set_aside()
            return None
        else:
            path = Path(resume)
        checkpoint = load_checkpoint(path)
        if "optimizer" not in checkpoint or "iter" not in checkpoint:
            raise UserError(f"checkpoint {path} holds weights only: training cannot resume from it")
        check_same_model(self.config.model, checkpoint["model"], path)
        return checkpoint

    def _set_aside(self) -> None:
        """Keep a checkpoint that a new run would overwrite, under a name of its own."""
        if self.world.is_main and self.last_path.is_file():
            stamp = time.strftime("%Y%m%d-%H%M%S")
            kept = self.last_path.with_name(f"iter_last.before-{stamp}.pth")
            self.last_path.rename(kept)
            logger.info("starting anew; the checkpoint that was there is kept as %s", kept)

    def _choose_seed(self, checkpoint: dict[str, Any] | None) -> int:
        seed = self.config.seed
        if seed is None and checkpoint is not None:
            seed = checkpoint.get("seed")
        if seed is None:
            seed = gather_objects(secrets.randbits(31))[0]
        return int(seed)

    def _load_phase0(self) -> None:
        path = phase0_weights(self.config, self.options)
        checkpoint = load_checkpoint(path)
        check_same_model(self.config.model, checkpoint["model"], path)
        state = {k.removeprefix("module."): v for k, v in checkpoint["model"]["sd"].items()}
        own = self.model.state_dict()
        fresh = {k for k in own if k.startswith(("light_sampler", "classifier."))}
        kept = {k: v for k, v in state.items() if k not in fresh}
        load_weights(self.model, {**{k: own[k] for k in fresh}, **kept}, path)
        logger.info("backbone and heavy upsampler from %s", path)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        load_weights(self.model, checkpoint["model"]["sd"], self.last_path)
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"]["sd"])
            self.scheduler.load_state_dict({"step": self.start})
        except (ValueError, KeyError) as error:
            raise UserError(
                f"checkpoint {self.last_path}: its optimizer state does not fit the config "
                f"({error}); start anew with --resume never"
            ) from error
        if "rng" in checkpoint:
            torch.set_rng_state(checkpoint["rng"])
        logger.info("resumed at iteration %d", self.start)

    # What one sees

    def _announce(self) -> None:
        if not self.world.is_main:
            return
        self.options.save_dir.mkdir(parents=True, exist_ok=True)
        resolved = {**self.config.raw, "seed": self.seed}
        write_text(self.options.save_dir / "config.yaml", dump_yaml(resolved))
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        logger.info(
            "%s on %s x %d, %s, seed %d: %.2fK parameters, %.2fK trained, iterations %d to %d",
            self.config.name,
            self.world.device,
            self.world.size,
            self.config.precision,
            self.seed,
            total / 1e3,
            trained / 1e3,
            self.start,
            self.config.iter_max,
        )

    def _progress(self) -> tqdm:
        return tqdm(
            initial=self.start,
            total=self.config.iter_max,
            desc=self.config.name,
            unit="it",
            dynamic_ncols=True,
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )

    def _recorder(self) -> Recorder:
        return Recorder(self.options.save_dir if self.world.is_main else None)


def phase0_weights(config: Config, options: TrainOptions) -> Path:
    """Where phase 1 starts: ``--init``, the config's `init`, or the phase 0 config's weights.

    Raises:
        UserError: there are none.
    """
    named = options.init or config.init
    if named is not None:
        return Path(named)
    folder = options.save_dir.with_name(config.name.replace("phase1", "phase0"))
    for place in (folder, Path("save") / folder.name):
        try:
            return find_weights(place)
        except UserError:
            continue
    raise UserError(
        f"phase 1 starts from phase 0's weights, and {folder} has none: train phase 0, "
        f"or name a checkpoint with --init"
    )


def train(config: Config, options: TrainOptions, world: World) -> int:
    """Train `config`, resuming as `options` say. Returns the process's exit code.

    Raises:
        UserError: anything that the user can put right.
    """
    return Trainer(config, options, world).run()
