"""The training loop that originals and both PCSR phases share."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import models
from engine.announcement import announce
from engine.checkpoints import Checkpoints
from engine.compiled import compiled
from engine.data import Batch, TrainBatches, to_device, validation_sets
from engine.divergence import Divergence, first_not_finite
from engine.gradients import BatchGradients, Losses
from engine.memory import memory_named
from engine.objectives import make_objective
from engine.pixel_loss import PixelLoss
from engine.recorder import Recorder
from engine.reviver import Reviver
from engine.run_folder import check_place, open_folder, warn_of_changes
from engine.saver import Saver
from engine.start import Start, TrainOptions, find_start, is_complete
from engine.state import TrainState
from engine.stop import StopSignal
from engine.train_checks import (
    check_compile,
    check_model,
    check_scale,
    check_validation_scales,
    required_sections,
)
from engine.validation import validate, validated_on
from engine.validation_sizes import check_validation_images
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
from utils.lock import locked

logger = logging.getLogger(__name__)


# A batch takes the most.
_TOO_LITTLE_MEMORY = (
    "not enough memory to train: compute a batch in parts (`accumulate: 2` or more), or lower "
    "`train_dataset.batch_size`; pictures in memory (`cache`) take some, too"
)


class _Next(NamedTuple):
    """What an iteration starts with.

    Attributes:
        batch: on the device.
        data_s: how long this rank waited for it, and for nothing else.
        signal_number: that any rank got, else 0.
        overdue: whether to save now.
    """

    batch: Batch
    data_s: float
    signal_number: int
    overdue: bool


def train(config: Config, options: TrainOptions, world: World) -> int:
    """Train `config`, resuming as `options` say.

    Returns:
        the exit code: 0, or 128 + N after signal N.

    Raises:
        UserError: anything that the user can put right.
    """
    with contextlib.ExitStack() as stack:
        together(lambda: stack.enter_context(locked(options.save_dir)) if world.is_main else None)
        start = on_main(lambda: find_start(config, options))
        if on_main(lambda: is_complete(config, options, start)):
            if world.is_main:
                warn_of_changes(options.save_dir, config, start)
            logger.info(
                "nothing to do: finished at iteration %d; a larger `iter_max` goes on from there, "
                "--resume never starts anew",
                start.iteration,
            )
            return 0
        on_main(lambda: check_place(options.save_dir))
        with memory_named(_TOO_LITTLE_MEMORY):
            return Trainer(config, options, world, start).run()


class Trainer:
    """Trains one config in one folder; see :func:`train`."""

    def __init__(self, config: Config, options: TrainOptions, world: World, start: Start) -> None:
        self.config = config
        self.options = options
        self.world = world
        self.start = start
        together(self._build)
        broadcast_state(self.model)

    def run(self) -> int:
        """Train to `iter_max`. Returns the exit code."""
        self._try_data()
        together(lambda: self._open_folder() if self.world.is_main else None)
        # No checkpoint yet: one without any training would stand in for released weights.
        self.saver.start_clock()
        with (
            StopSignal() as stop,
            self.gradients,
            self._recorder() as recorder,
            self._progress() as bar,
        ):
            self._catch_up(recorder)
            if self.start.iteration >= self.config.iter_max:
                # Where the newest checkpoint was damaged.
                self.saver.save(self.start.iteration, recorder.means_so_far)
            return self._loop(stop, recorder, bar)

    def _build(self) -> None:
        """Everything that a wrong config can break."""
        config, start = self.config, self.start
        data, optimizer_spec = required_sections(config)
        check_compile(config, self.world.size)
        self.data = data
        torch.manual_seed(start.seed)
        self.model = models.make(config.model, data_norm=config.data_norm)
        check_model(config, self.model)
        self.model.to(self.world.device).train()
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = TrainState(config, self.model, optimizer_spec, start)
        self.pixel_loss = PixelLoss(config.l2_from, config.psnr_from).to(self.world.device)
        self.gradients = self._make_gradients()
        self.validation = self._open_validation()
        self.validated_on = validated_on(self.validation, config.psnr_type)  # type: ignore[arg-type]
        save_dir = self.options.save_dir
        self.checkpoints = Checkpoints(
            save_dir,
            keep_last=config.keep_last,
            resumed_at=start.iteration if start.is_of(save_dir) else None,
            validated_on=self.validated_on,
        )
        self.divergence = Divergence(
            self.state,
            allowed=config.nan_skip,
            seed=start.seed,
            last=self.checkpoints.last_path,
        )
        self.samples = TrainBatches(
            data, seed=start.seed, start=start.iteration, stop=config.iter_max, world=self.world
        )
        self.batches: Iterator[Batch] = self.samples
        is_newest = start.resumes and start.path == self.checkpoints.last_path
        self.saver = Saver(
            self.world,
            self.state,
            self.checkpoints,
            self.divergence,
            start.iteration if is_newest else None,
        )
        self.reviver = Reviver(
            self.model,
            self.state,
            self.samples,
            self.gradients,
            batch_size=data.batch_size,
            seed=start.seed,
        )

    def _open_validation(self) -> list[tuple[float, Dataset]]:
        if self.config.valid_dataset is None:
            return []
        sets = validation_sets(self.config.valid_dataset)
        check_validation_scales(self.model, [scale for scale, _ in sets])
        if self.world.is_main:
            check_validation_images(sets, self.model)
        return sets

    def _make_gradients(self) -> BatchGradients:
        config = self.config
        objective = make_objective(
            self.model,
            loss_rgb_w=config.loss_rgb_w,
            loss_avg_w=config.loss_avg_w,
            routing_loss=config.routing_loss,
            pixel_loss=self.pixel_loss,
        )
        run = compiled(objective, config.compile, self.world.device)
        return BatchGradients(
            objective,
            self.state.trained,
            world=self.world,
            batch_size=self.data.batch_size,
            microbatches=config.microbatches if config.compile == "none" else 1,
            precision=config.precision,
            rounds=config.accumulate,
            clip=config.grad_clip,
            run=run,
            capture=config.compile == "capture",
        )

    def _try_data(self) -> None:
        """Read the first batch: data that do not fit are refused before the folder is touched."""
        if self.start.iteration >= self.config.iter_max:
            return
        batch, problem = self._read_batch()
        skipped = self.samples.skipped
        failed, has_skipped = max_over_ranks([int(problem is not None), int(skipped.has_news())])
        if failed:
            if has_skipped:
                skipped.report()
            fail_together(problem)
        self.batches = _with_first([batch], self.batches)

    # The loop

    def _loop(self, stop: StopSignal, recorder: Recorder, bar: tqdm) -> int:
        config, end = self.config, self.config.iter_max
        for step in range(self.start.iteration, end):
            found = self._next_batch(stop.number)
            # Never untrained weights: in their place, released ones are taken.
            if step > 0 and (found.signal_number or found.overdue):
                self.saver.save(step, recorder.means_so_far)
            if found.signal_number:
                where = f"saved at iteration {step}" if step else "before the first iteration"
                logger.info("stopped by signal %d: %s", found.signal_number, where)
                return 128 + found.signal_number
            if step in config.revive:
                with recorder.paused():
                    self.reviver.revive(step)
            if step in self.pixel_loss.changes:
                recorder.restart()
            losses = self._iterate(step, found.batch)
            done = step + 1
            recorder.add(losses, self.state.lr, found.data_s)
            bar.update()
            if _is_due(done, config.iter_print, end):
                bar.set_postfix_str(recorder.flush(done))
            # Before a validation, too: it may take longer than who ends the run will wait.
            if self._is_validated(done) or _is_due(done, config.iter_save, end):
                self.saver.save(done, recorder.means_so_far)
            if self._is_validated(done):
                self._validate(done, recorder)
        recorder.summary()
        self.reviver.tell(end)
        logger.info("finished at iteration %d: %s%s", end, self.checkpoints.last_path, self._best())
        return 0

    def _next_batch(self, signal_number: int) -> _Next:
        """The next batch, and what the ranks agree on before they compute it.

        Args:
            signal_number: that this rank got, else 0.

        Raises:
            UserError: the data of any rank cannot be read.
        """
        began = time.monotonic()
        batch, problem = self._read_batch()
        # Before the ranks meet: on all others, a slow one would look like slow data.
        data_s = time.monotonic() - began
        # Rank 0 writes, so its clock counts.
        overdue = self.world.is_main and self.saver.is_overdue(self.config.iter_save_s)
        failed, signal_number, saving, has_skipped = max_over_ranks(
            [
                int(problem is not None),
                signal_number,
                int(overdue),
                int(self.samples.skipped.has_news()),
            ]
        )
        if has_skipped:
            self.samples.skipped.report()
        if failed:
            fail_together(problem)
        return _Next(batch, data_s, signal_number, bool(saving))

    def _read_batch(self) -> tuple[Batch, str | None]:
        """This rank's part of the next batch, on the device; or why there is none."""
        try:
            batch = next(self.batches)
            check_scale(self.model, batch)
            return to_device(batch, self.world.device), None
        except UserError as error:
            return {}, str(error)

    def _iterate(self, step: int, batch: Batch) -> Losses:
        """One iteration; returns its losses, means over all ranks; none if it is left out."""
        lr = batch["lr"]
        if self.config.channels_last:
            lr = lr.contiguous(memory_format=torch.channels_last)
        self.state.set_step(step)
        self.pixel_loss.set_step(step)
        buffers = self.state.buffers() if self.config.nan_skip else []
        losses = self.gradients(lr, batch["hr"])
        done = step + 1
        bad = first_not_finite(losses) if self._is_checked(done) else None
        if bad is not None:
            self.divergence.leave_out(bad, done)
            self.state.restore_buffers(buffers)
            return {}
        self.state.update(done)
        return losses

    def _is_checked(self, done: int) -> bool:
        """Whether to look at the losses now: on a GPU that means waiting for it."""
        config, end = self.config, self.config.iter_max
        if config.nan_skip or self.world.device.type == "cpu" or self._is_validated(done):
            return True
        return _is_due(done, config.iter_print, end) or _is_due(done, config.iter_save, end)

    # Validation

    def _is_validated(self, done: int) -> bool:
        return bool(self.validation) and _is_due(done, self.config.iter_val, self.config.iter_max)

    def _validate(self, done: int, recorder: Recorder) -> None:
        with recorder.paused():
            with self.gradients.all_threads(), self.state.averaged():
                results = validate(
                    self.model,
                    self.validation,
                    psnr_type=self.config.psnr_type,  # type: ignore[arg-type]
                    world=self.world,
                )
            psnr = results[0][1][0].psnr
            self.saver.save_if_best(done, psnr, recorder.means_so_far)
            recorder.validation(done, results)

    def _catch_up(self, recorder: Recorder) -> None:
        """Validate where the run was killed between saving and the end of a validation."""
        done = self.start.iteration
        due = self.start.resumes and self._is_validated(done)
        if due and not on_main(lambda: recorder.has_validation(done)):
            self._validate(done, recorder)

    def _best(self) -> str:
        best = self.checkpoints.best
        if best is None:
            return ""
        where = f"{self.checkpoints.best_path}, {best.psnr:.3f} dB at iteration {best.iteration}"
        return f"; best in validation: {where}"

    # What one sees

    def _open_folder(self) -> None:
        self.checkpoints.remove_leftovers()
        open_folder(self.options.save_dir, self.config, self.start)
        announce(self.config, self.model, self.world, self.start, self.pixel_loss)

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
        resumed = self.start.checkpoint if self.start.resumes else None
        return Recorder(
            self.options.save_dir if self.world.is_main else None,
            start=self.start.iteration,
            end=self.config.iter_max,
            batch_size=self.data.batch_size,
            validated_on=self.validated_on,
            means=(resumed or {}).get("means"),
        )


def _with_first(first: list[Batch], others: Iterator[Batch]) -> Iterator[Batch]:
    """The batch in `first`, which is not kept, and the others."""
    yield first.pop()
    yield from others


def _is_due(done: int, every: int, end: int) -> bool:
    """True after each `every` iterations (0: never), and at the end."""
    return done == end or (every > 0 and done % every == 0)
