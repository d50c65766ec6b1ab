"""From a config's data sections to training batches and validation samples."""

import atexit
import ctypes
import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import datasets
from datasets.batches import DeviceBatches, NotOnDevice
from datasets.pairing import common_size
from datasets.sampling import IterationBatchSampler
from datasets.wrappers import SRImplicitPaired
from engine.skipped import SkippedImages
from utils.config import DataConfig
from utils.distributed import World
from utils.errors import UserError
from utils.images import read_size
from utils.signals import ending_signals

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)


def make_samples(data: DataConfig, where: str, **wrapper_args: Any) -> Dataset:
    """The wrapped data set of one config section; `wrapper_args` replace the config's.

    Its images are not decoded yet: a misspelt key is found before.
    """
    source = datasets.make(data.dataset, f"{where}.dataset")
    return datasets.make_wrapper(_changed(data.wrapper, wrapper_args), source, f"{where}.wrapper")


def _changed(spec: dict[str, Any], args: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "args": {**(spec.get("args") or {}), **args}}


def _load(samples: Any) -> Dataset:
    """`samples` with their cache filled; loader processes forked later share it."""
    samples.dataset.load()
    return samples


class TrainBatches(Iterator[Batch]):
    """One rank's share of the batches of iterations `start` to `stop` - 1.

    A batch is a function of (seed, iteration) alone: not of the number of ranks or workers, nor
    of whether training was interrupted.

    With `cache: device`, batches are made on the device as a whole; where that cannot be, a
    message says why, and data loaders make them.

    Attributes:
        skipped: the damaged images among them. Who takes batches is to have them reported.

    Yields:
        ``{"lr": (B, 3, h, w), "hr": (B, 3, H, W)}`` float32 on the CPU or on the device.

    Raises:
        UserError: at once, a data set that cannot be opened or a batch that does not divide over
            the ranks; while yielding, an image that is damaged or too small, samples of different
            sizes, or a dead loader process.
    """

    def __init__(self, data: DataConfig, *, seed: int, start: int, stop: int, world: World) -> None:
        samples: Any = make_samples(data, "train_dataset")
        self._data = data
        self._seed = seed
        self._world = world
        self._samples = samples
        sampler = self._sampler(start, stop)
        self._on_device: DeviceBatches | None = None
        if samples.dataset.cache == "device":
            self._on_device = _device_batches(samples, world)
        else:
            samples.dataset.load()
        self._made = self._batches(sampler, -(-data.num_workers // world.size))
        self.skipped = SkippedImages(samples.dataset)

    def __next__(self) -> Batch:
        return next(self._made)

    def of(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of these iterations, made by this process; those to come stay the same."""
        return self._batches(self._sampler(start, stop), 0)

    def _sampler(self, start: int, stop: int) -> IterationBatchSampler:
        return IterationBatchSampler(
            length=len(self._samples),
            batch_size=self._data.batch_size,
            seed=self._seed,
            start=start,
            stop=stop,
            rank=self._world.rank,
            world_size=self._world.size,
        )

    def _batches(self, sampler: IterationBatchSampler, workers: int) -> Iterator[Batch]:
        if self._on_device is not None:
            return self._on_device.batches(sampler)
        return _loaded_batches(self._samples, sampler, workers, self._world.device)


def _device_batches(samples: Any, world: World) -> DeviceBatches | None:
    """None where batches cannot be made on the device; the images are then in another cache."""
    try:
        return DeviceBatches(samples, world.device, world.local_size)
    except NotOnDevice as reason:
        logger.warning("cache `device` is replaced by `%s`: %s", reason.instead, reason)
        samples.dataset.load(reason.instead)
        return None


def _loaded_batches(
    samples: Dataset, sampler: IterationBatchSampler, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches from data loader processes, or from this one where there are none."""
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_WorkerSignals() if workers else None,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),  # not the global one, whose state belongs to the run
    )
    return _with_plain_errors(iter(loader))


def _collate(samples: list[Batch]) -> Batch:
    sizes = {tuple(sample["lr"].shape) for sample in samples}
    if len(sizes) > 1:
        raise UserError(
            "config: `train_dataset.wrapper.args.inp_size` is missing: without it samples are "
            "whole images, and these differ in size"
        )
    if len({tuple(sample["hr"].shape) for sample in samples}) > 1:
        raise UserError(
            "train_dataset: pairs of several scales are in one batch: keep a folder for each scale"
        )
    return default_collate(samples)


class _WorkerSignals:
    """Loader processes leave it to the main process what a signal ends.

    Ctrl-C, `timeout` and batch systems signal every process of a run, and the main one needs its
    loaders until the iteration is done. Only once it exits does SIGTERM end them.
    """

    def __init__(self) -> None:
        self._exiting: Any = multiprocessing.Value(ctypes.c_bool, False, lock=False)
        # Runs before multiprocessing's own exit handler, which terminates and then waits.
        atexit.register(self._set_exiting)

    def __call__(self, _worker_id: int) -> None:
        for number in ending_signals():
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _set_exiting(self) -> None:
        self._exiting.value = True

    def _on_sigterm(self, *_: object) -> None:
        if self._exiting.value:
            os._exit(0)


def _with_plain_errors(iterator: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        try:
            batch = next(iterator, None)
        except (ValueError, OSError) as error:
            # A worker's error comes with the worker's traceback in its message.
            name = type(error).__name__
            raise UserError(str(error).rsplit(f"{name}: ", 1)[-1].strip()) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                "a data loader process has died (out of memory?): lower `train_dataset.num_workers`"
            ) from error
        if batch is None:
            return
        yield batch


def validation_sets(data: DataConfig) -> list[tuple[float, Dataset]]:
    """(scale, samples) of every validation scale; the scale is 0 where nothing tells it.

    Damaged images are never skipped: figures without them would look like any other.

    Raises:
        UserError: a data set that cannot be opened, or scales that pairs on disk cannot serve.
    """
    data = replace(data, dataset=_changed(data.dataset, {"on_error": "stop"}))
    if data.wrapper.get("name") != "sr-implicit-downsampled":
        if len(data.scales) > 1:
            raise UserError("config: `valid_dataset.scales`: pairs on disk have one scale")
        pairs = _load(make_samples(data, "valid_dataset"))
        return [(data.scales[0] if data.scales else _scale_of(pairs), pairs)]
    if not data.scales:
        samples: Any = _load(make_samples(data, "valid_dataset"))
        return [(samples.highest_scale, samples)]
    return [(s, _load(make_samples(data, "valid_dataset", scale=s))) for s in data.scales]


def _scale_of(samples: Dataset) -> float:
    """Of pairs on disk, the one that all have; 0 where they differ, and of other samples."""
    if not isinstance(samples, SRImplicitPaired):
        return 0.0
    pairs = zip(samples.dataset.hr_paths, samples.dataset.lr_paths, strict=True)
    scales = {common_size(read_size(hr), read_size(lr), hr.name)[0] for hr, lr in pairs}
    return float(scales.pop()) if len(scales) == 1 else 0.0


def rank_share(samples: Dataset, world: World) -> Iterator[tuple[int, Batch]]:
    """(index, sample) of every `world.size`-th sample, starting at this rank's."""
    length: int = len(samples)  # type: ignore[arg-type]
    for index in itertools.islice(range(length), world.rank, None, world.size):
        yield index, samples[index]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, without waiting where its memory is pinned."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
