"""What of training is measured: samples, steps, and whole runs, each as something to call."""

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.cases import REPOSITORY
from benchmarks.straightforward import SCALE, straightforward_batches, use_reference
from engine.data import TrainBatches, to_device
from engine.start import Start, TrainOptions
from engine.trainer import Trainer
from utils.config import Config, load_config
from utils.distributed import World
from utils.errors import UserError
from utils.images import Picture, list_images, read_rgb, write_picture
from utils.machine import Timer

What = Literal["data", "step", "end_to_end"]
Variant = Literal["straightforward", "ours", "reference", "dense"]

LR_SIDE = 32
SUB_IMAGE = SCALE * LR_SIDE
_MOST_SUB_IMAGES = 512
# A timed call takes at least about this long, or one batch.
_CALL_S = 0.05
_MOST_BATCHES = 200
# The last of a run's parts are reported: the first holds what happens once.
_PARTS = 4
# The step that ours is compared with: a batch as a whole, in the usual layout.
_AS_PUBLISHED = ("microbatches=1", "channels_last=false")


@dataclass(frozen=True)
class Case:
    """One thing to measure; None where a word does not apply.

    Attributes:
        what: samples alone, steps on one batch, or training runs.
        variant: "straightforward" (samples one by one; in runs with the reference step),
            "reference" (upsamplers pixel by pixel, the batch as a whole), "dense" or "ours".
        backbone, phase, precision, compile: of the network and its step.
        cache: of the training data.
        processes: that make the samples.
    """

    what: What
    variant: Variant
    backbone: str | None = None
    phase: int | None = None
    precision: str | None = None
    compile: str | None = None
    cache: str | None = None
    processes: int = 1

    def __str__(self) -> str:
        words = [self.what, self.variant, self.backbone, self.precision, self.compile, self.cache]
        if self.phase is not None:
            words.insert(3, f"phase {self.phase}")
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Setting:
    """What all cases share.

    Attributes:
        sub_images: folder of PNG files, one HR crop each.
        scratch: folder for what is written.
        device: where to train.
        batch_size: samples per iteration.
        seconds: duration of a run.
        overrides: ``key.path=value`` for the configs.
    """

    sub_images: Path
    scratch: Path
    device: torch.device
    batch_size: int
    seconds: float
    overrides: tuple[str, ...] = ()

    @property
    def world(self) -> World:
        """One process."""
        return World(0, 1, self.device)

    def config(self, case: Case, iterations: int = 1 << 40) -> Config:
        """The shipped config of the case's network, on the sub-images."""
        args: dict[str, Any] = {"root_path": str(self.sub_images), "cache": case.cache or "device"}
        if case.cache == "lmdb":
            args["cache_dir"] = str(self.scratch / "lmdb")
        wrapper = {"inp_size": LR_SIDE, "scale": SCALE, "augment": True}
        keys = {
            "train_dataset.dataset": {"name": "image-folder", "args": args},
            "train_dataset.wrapper": {"name": "sr-implicit-downsampled", "args": wrapper},
            "train_dataset.batch_size": self.batch_size,
            "train_dataset.num_workers": case.processes if case.processes > 1 else 0,
            "valid_dataset": None,
            "precision": case.precision or "fp32",
            "compile": case.compile or "none",
            "channels_last": self.device.type == "cpu",  # as in configs/cpu/
            "iter_max": iterations,
            "iter_print": max(1, iterations // _PARTS),
            "iter_save": iterations,
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        name = f"{case.backbone or 'fsrcnn'}-pcsr-phase{case.phase or 0}"
        path = REPOSITORY / "configs" / f"{name}.yaml"
        published = case.variant in ("reference", "straightforward")
        last = _AS_PUBLISHED if published else ()
        return load_config(path, [*overrides, *self.overrides, *last])


def cut_sub_images(source: Path, target: Path) -> int:
    """Cut the images of a folder into PNG files of one HR crop each, and count them.

    Raises:
        UserError: no folder, or no image is large enough.
    """
    count = 0
    for path in list_images(source):
        rgb = read_rgb(path)
        tops, lefts = (range(0, side - SUB_IMAGE + 1, SUB_IMAGE) for side in rgb.shape[:2])
        for top, left in itertools.product(tops, lefts):
            if count == _MOST_SUB_IMAGES:
                return count
            crop = rgb[top : top + SUB_IMAGE, left : left + SUB_IMAGE]
            write_picture(target / f"{count:04d}.png", Picture(crop.copy()))
            count += 1
    if not count:
        raise UserError(f"no image in {source} has {SUB_IMAGE}x{SUB_IMAGE} pixels")
    return count


def prepared(case: Case, setting: Setting) -> Callable[[], float]:
    """What measures samples or steps once: seconds per sample, or per iteration."""
    if case.what == "data":
        return _data_call(case, setting)
    return _step_call(case, setting)


def _batches(case: Case, setting: Setting) -> Iterator[dict[str, Tensor]]:
    if case.variant == "straightforward":
        return straightforward_batches(list_images(setting.sub_images), setting.batch_size)
    data = setting.config(case).train_dataset
    assert data is not None
    return TrainBatches(data, seed=0, start=0, stop=1 << 40, world=setting.world)


def _data_call(case: Case, setting: Setting) -> Callable[[], float]:
    batches = _batches(case, setting)

    def seconds(count: int) -> float:
        with Timer(setting.device) as timer:
            for batch in itertools.islice(batches, count):
                to_device(batch, setting.device)
        return timer.elapsed_s

    seconds(1)
    count = min(_MOST_BATCHES, max(1, round(_CALL_S / seconds(1))))
    # What loader processes made while others were measured is not to count.
    ready = 8 * case.processes if case.processes > 1 else 0

    def call() -> float:
        seconds(ready)
        return seconds(count) / (count * setting.batch_size)

    return call


def _step_call(case: Case, setting: Setting) -> Callable[[], float]:
    trainer = _trainer(setting.config(case), case, setting)
    batch = to_device(next(trainer.batches), setting.device)

    def call() -> float:
        with trainer.gradients, Timer(setting.device) as timer:
            trainer._iterate(0, batch)
        return timer.elapsed_s

    # Memory is laid out in the first, and a compiler may look again in the second.
    call()
    call()
    return call


def _trainer(config: Config, case: Case, setting: Setting) -> Trainer:
    folder = Path(tempfile.mkdtemp(dir=setting.scratch))
    # Phase 1 with untrained weights: they cost the same.
    trainer = Trainer(config, TrainOptions(folder), setting.world, Start(0, 0))
    if case.variant in ("reference", "straightforward"):
        use_reference(trainer.model)
    if case.variant == "straightforward":
        trainer.batches = _batches(case, setting)
    return trainer


def prepared_run(case: Case, setting: Setting) -> Callable[[], tuple[float, float]]:
    """What trains for a few seconds: iterations per second, and the share of waiting for data."""
    step = _step_call(case, setting)
    step_s = min(step(), step())
    iterations = _PARTS * max(1, round(setting.seconds / step_s / _PARTS))

    def call() -> tuple[float, float]:
        trainer = _trainer(setting.config(case, iterations), case, setting)
        trainer.run()
        text = (trainer.options.save_dir / "metrics.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        parts = [row for row in rows if row["kind"] == "train"][1:]
        return _mean(parts, "iterations_per_s"), _mean(parts, "data_share")

    return call


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)
