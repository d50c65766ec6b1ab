"""What is sampled depends on the seed and the place in the run, on nothing else."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import make, make_wrapper
from datasets.sampling import IterationBatchSampler, SampleKey
from utils.errors import UserError
from utils.images import Picture, write_picture


def sampler(**changes: int) -> IterationBatchSampler:
    arguments = {"length": 7, "batch_size": 4, "seed": 3, "start": 0, "stop": 10}
    return IterationBatchSampler(**{**arguments, **changes})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in "abcde":
        rgb = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        write_picture(tmp_path / f"{name}.png", Picture(rgb))
    return tmp_path


def samples(folder: Path, scale: list[float]) -> torch.utils.data.Dataset:
    source = make({"name": "image-folder", "args": {"root_path": str(folder), "repeat": 3}})
    args = {"inp_size": 6, "scale": scale, "augment": ["hflip", "vflip", "dflip"]}
    return make_wrapper({"name": "sr-implicit-downsampled", "args": args}, source)


def test_each_epoch_holds_each_index_once() -> None:
    keys = [key for batch in sampler(stop=7) for key in batch]
    assert [key.position for key in keys] == list(range(28))
    assert Counter(key.index for key in keys) == dict.fromkeys(range(7), 4)
    epochs = [tuple(key.index for key in keys[first : first + 7]) for first in (0, 7, 14)]
    assert len(set(epochs)) == 3


def test_resuming_sees_what_a_straight_run_sees() -> None:
    straight = list(sampler())
    assert list(sampler(start=6)) == straight[6:]
    assert len(sampler(start=6)) == 4
    assert list(sampler(seed=0)) != straight


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batch(world_size: int) -> None:
    shares = zip(*(sampler(rank=r, world_size=world_size) for r in range(world_size)), strict=True)
    joined = [[key for share in ranks for key in share] for ranks in shares]
    assert joined == list(sampler())


def test_uneven_batches_and_empty_sets_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of their number, 3"):
        sampler(world_size=3)
    with pytest.raises(UserError, match="empty"):
        sampler(length=0)
    with pytest.raises(UserError, match="seed"):
        sampler(seed=-1)


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (1, "spawn")])
def test_workers_do_not_change_the_batches(images: Path, workers: int, context: str) -> None:
    data = samples(images, scale=[2, 4])
    alone = list(DataLoader(data, batch_sampler=sampler(length=15, stop=4)))
    shared = list(
        DataLoader(
            data,
            batch_sampler=sampler(length=15, stop=4),
            num_workers=workers,
            multiprocessing_context=context,
        )
    )
    for batch, other in zip(alone, shared, strict=True):
        assert torch.equal(batch["lr"], other["lr"])
        assert torch.equal(batch["hr"], other["hr"])
    assert len({batch["hr"].shape for batch in alone}) > 1, "each iteration draws its scale"


def test_keys_travel_to_workers() -> None:
    key = SampleKey(1, 2, 3, 4)
    assert pickle.loads(pickle.dumps(key)) == key
    assert key.scale(4, 4) == 4
    assert 2 <= key.scale(2, 4) <= 4
