"""From a config's data sections to loaders and validation samples."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import datasets
from datasets.sampling import IterationBatchSampler
from utils.config import DataConfig
from utils.distributed import World
from utils.errors import UserError


def make_samples(data: DataConfig, where: str, **wrapper_args: Any) -> Dataset:
    """The wrapped data set of one config section; `wrapper_args` replace the config's."""
    wrapper = {**data.wrapper, "args": {**(data.wrapper.get("args") or {}), **wrapper_args}}
    source = datasets.make(data.dataset, f"{where}.dataset")
    return datasets.make_wrapper(wrapper, source, f"{where}.wrapper")


def train_batches(
    data: DataConfig, *, seed: int, start: int, stop: int, world: World
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of the batches of iterations `start` to `stop` - 1.

    A batch is a function of (seed, iteration) alone: not of the number of ranks or workers, nor
    of whether training was interrupted.

    Yields:
        ``{"lr": (B, 3, h, w), "hr": (B, 3, H, W)}`` float32 on the CPU.
    """
    samples = make_samples(data, "train_dataset")
    sampler = IterationBatchSampler(
        length=len(samples),  # type: ignore[arg-type]
        batch_size=data.batch_size,
        seed=seed,
        start=start,
        stop=stop,
        rank=world.rank,
        world_size=world.size,
    )
    workers = -(-data.num_workers // world.size)
    loader = DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def validation_sets(data: DataConfig) -> list[tuple[float, Dataset]]:
    """(scale, samples) of every validation scale.

    Raises:
        UserError: scales that fixed HR / LR pairs cannot serve.
    """
    args = data.wrapper.get("args") or {}
    if "scale" not in args and not data.scales:
        return [(0.0, make_samples(data, "valid_dataset"))]
    if data.wrapper.get("name") != "sr-implicit-downsampled":
        if len(data.scales) > 1:
            raise UserError("config: `valid_dataset.scales`: pairs on disk have one scale")
        return [(data.scales[0], make_samples(data, "valid_dataset"))]
    scales = data.scales or [float(max(args["scale"]))]
    return [(s, make_samples(data, "valid_dataset", scale=[s, s])) for s in scales]


def rank_share(samples: Dataset, world: World) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(index, sample) of every `world.size`-th sample, starting at this rank's."""
    length: int = len(samples)  # type: ignore[arg-type]
    for index in itertools.islice(range(length), world.rank, None, world.size):
        yield index, samples[index]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch, without waiting where its memory is pinned."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
