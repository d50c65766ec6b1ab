"""`cache: device`: whole batches made on the device, the same as those of every other cache."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datasets.batches
import datasets.device_images
from datasets.batches import NotOnDevice, _check_memory
from datasets.draws import draw, sample_bits
from datasets.sampling import SampleKey
from engine.data import TrainBatches
from tests.processes import free_port
from tests.test_datasets import write_images
from tests.training import checkpoint_of, differences, make_pictures, raw_config, run
from utils.config import Config, DataConfig, check_config
from utils.distributed import World, world
from utils.errors import UserError
from utils.machine import free_memory_bytes

ONE = World(0, 1, torch.device("cpu"))
SIZES = {"a.png": (20, 31), "b.png": (40, 26), "c.png": (24, 24), "d.png": (20, 20)}
ALL_FLIPS = ["hflip", "vflip", "dflip"]


def folder_data(folder: Path, cache: str, wrapper: dict[str, Any], **args: Any) -> DataConfig:
    args = {"root_path": str(folder), "cache": cache, **args}
    dataset = {"name": "image-folder", "args": args}
    return DataConfig(dataset, {"name": "sr-implicit-downsampled", "args": wrapper}, batch_size=6)


def batches(data: DataConfig, world: World = ONE, first: int = 0, last: int = 5) -> list:
    return list(TrainBatches(data, seed=3, start=first, stop=last, world=world))


def assert_equal(found: list, expected: list) -> None:
    for batch, other in zip(found, expected, strict=True):
        assert list(batch) == ["lr", "hr"] and batch["hr"].dtype == torch.float32
        assert torch.equal(batch["hr"], other["hr"])
        assert torch.equal(batch["lr"], other["lr"])


def device_config(pictures: Path, **changes: Any) -> Config:
    raw = raw_config("fsrcnn", pictures, **changes)
    raw["train_dataset"]["dataset"]["args"]["cache"] = "device"
    return check_config(raw, "fsrcnn")


def test_bits_and_draws_are_numpys() -> None:
    positions = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3])
    for seed in (0, 3, 2**32 - 1, 2**70 + 5):
        for bits, position in zip(sample_bits(seed, positions), positions, strict=True):
            key = SampleKey(0, int(position), 0, seed)
            assert bits.tolist() == key.generator().bit_generator.random_raw(4).tolist()
    # With one place on an axis nothing is drawn for it; with billions, numpy often draws again.
    rng = np.random.default_rng(0)
    tops = np.concatenate([rng.integers(1, 4, 300), rng.integers(2**31, 2**32 - 1, 300)])
    lefts = np.concatenate([rng.integers(1, 3, 300), rng.integers(2**31, 2**32 - 1, 300)])
    draws = draw(7, np.arange(600), tops, lefts)
    for position in range(600):
        generator = SampleKey(0, position, 0, 7).generator()
        assert draws.top[position] == generator.integers(tops[position])
        assert draws.left[position] == generator.integers(lefts[position])
        assert draws.flips[position].tolist() == (generator.random(3) < 0.5).tolist()


@pytest.mark.parametrize("scale", [[4, 4], [2, 3.7]], ids=["one_scale", "range"])
@pytest.mark.parametrize("augment", [ALL_FLIPS, ["vflip"], False], ids=str)
def test_every_cache_gives_the_same_batches(tmp_path: Path, scale: list, augment: Any) -> None:
    folder = write_images(tmp_path / "in", SIZES)
    wrapper = {"inp_size": 5, "scale": scale, "augment": augment}
    arguments = {"repeat": 2, "cache_dir": str(tmp_path / "cache")}
    found = {
        cache: batches(folder_data(folder, cache, wrapper, **arguments))
        for cache in ("none", "in_memory", "lmdb", "device")
    }
    for cache in ("in_memory", "lmdb", "device"):
        assert_equal(found[cache], found["none"])


def test_every_cache_gives_the_same_pairs(tmp_path: Path) -> None:
    hr = write_images(tmp_path / "hr", {"a.png": (33, 24), "b.png": (26, 40), "c.png": (24, 24)})
    lr = write_images(tmp_path / "lr", {"a.png": (16, 12), "b.png": (13, 20), "c.png": (12, 12)})
    found = {}
    for cache in ("none", "device"):
        args = {"root_path_hr": str(hr), "root_path_lr": str(lr), "cache": cache}
        wrapper = {"name": "sr-implicit-paired", "args": {"inp_size": 12, "augment": ALL_FLIPS}}
        dataset = {"name": "paired-image-folders", "args": args}
        found[cache] = batches(DataConfig(dataset, wrapper, batch_size=6))
    assert_equal(found["device"], found["none"])


def test_crops_by_index_are_those_by_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices gather by index and reduce the batch at once: run here on the CPU."""
    folder = write_images(tmp_path, SIZES)
    data = folder_data(folder, "device", {"inp_size": 5, "scale": 4, "augment": ALL_FLIPS})
    expected = batches(data)
    module = datasets.device_images
    monkeypatch.setattr(module, "_copy_views", module.gather_indices)
    assert_equal(batches(data), expected)


def test_ranks_and_a_later_start_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path, SIZES)
    wrapper = {"inp_size": 5, "scale": [2, 3.7], "augment": ALL_FLIPS}
    data = folder_data(folder, "device", wrapper)
    straight = batches(data)
    assert_equal(batches(data, first=2), straight[2:])
    shares = [batches(data, World(rank, 3, ONE.device)) for rank in range(3)]
    joined = [
        {key: torch.cat([share[key] for share in row]) for key in ("lr", "hr")}
        for row in zip(*shares, strict=True)
    ]
    assert_equal(joined, straight)
    monkeypatch.setattr(datasets.batches, "_DRAWN_AT_ONCE", 7)
    assert_equal(batches(data), straight)


def test_what_does_not_fit_comes_from_another_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = write_images(tmp_path, dict.fromkeys(("a.png", "b.png"), (20, 20)))
    free = free_memory_bytes(ONE.device)
    assert free is not None and free > 2**20
    crops, whole = {"inp_size": 5, "scale": 4}, {"scale": 4}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        (crops, {"cache_share": 1e-12}, "replaced by `none`: the images take"),
        (whole, {}, "replaced by `in_memory`: without `inp_size`"),
        ({**crops, "lr_mode": "uint8"}, {}, "replaced by `in_memory`: `lr_mode: uint8`"),
    ]
    for wrapper, arguments, message in cases:
        caplog.clear()
        found = batches(folder_data(folder, "device", wrapper, **arguments))
        assert message in caplog.text
        assert_equal(found, batches(folder_data(folder, "none", wrapper)))


@pytest.mark.parametrize(
    ("gpu_bytes", "host_bytes", "processes", "instead"),
    [
        (10**4, 10**6, 8, "in_memory"),
        (10**4, 6 * 10**4, 8, "none"),
        (10**4, 6 * 10**4, 1, "in_memory"),
        (10**6, 1, 8, None),
    ],
)
def test_each_process_has_a_gpu_and_all_share_the_host(
    gpu_bytes: int,
    host_bytes: int,
    processes: int,
    instead: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = {"cuda": gpu_bytes, "cpu": host_bytes}
    monkeypatch.setattr("datasets.batches.free_memory_bytes", lambda device: free[device.type])
    sizes = [np.array([[100, 100]])]  # 30 kB
    if instead is None:
        _check_memory(sizes, 0.5, torch.device("cuda:0"), processes)
        return
    with pytest.raises(NotOnDevice, match="in each of 1 processes") as found:
        _check_memory(sizes, 0.5, torch.device("cuda:0"), processes)
    assert found.value.instead == instead


def test_pairs_of_several_scales_are_decoded_for_the_other_cache_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once they were decoded for both, and both held them for a moment."""
    caplog.set_level(logging.INFO)
    hr = write_images(tmp_path / "hr", {"a.png": (24, 24), "b.png": (36, 36), "c.png": (24, 30)})
    lr = write_images(tmp_path / "lr", {"a.png": (12, 12), "b.png": (12, 12), "c.png": (12, 15)})
    # Whether this pair has a scale does not matter: another takes its place.
    write_images(hr, {"d.png": (40, 60)})
    write_images(lr, {"d.png": (40, 13)})
    (lr / "d.png").write_bytes((lr / "d.png").read_bytes()[:200])
    found = {}
    for cache in ("none", "device"):
        folders = {"root_path_hr": str(hr), "root_path_lr": str(lr)}
        dataset = {
            "name": "paired-image-folders",
            "args": {**folders, "cache": cache, "on_error": "skip"},
        }
        wrapper = {"name": "sr-implicit-paired", "args": {"inp_size": 12}}
        found[cache] = batches(DataConfig(dataset, wrapper, batch_size=1))
    assert_equal(found["device"], found["none"])
    assert "replaced by `in_memory`: pairs have several scales: [2, 3]" in caplog.text
    decoded = [message for message in caplog.messages if "images decoded" in message]
    assert len(decoded) == 2 and all(message.endswith("in memory") for message in decoded)


def test_damaged_and_small_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path, SIZES)
    wrapper = {"inp_size": 5, "scale": 4}
    with pytest.raises(UserError, match=r"[ad]\.png is .*, too small for a crop of 24x24"):
        batches(folder_data(folder, "device", {"inp_size": 6, "scale": 4}))
    # One is damaged from its header on, one further on.
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "c.png").write_bytes((folder / "c.png").read_bytes()[:500])
    with pytest.raises(UserError, match=r"a\.png"):
        batches(folder_data(folder, "device", wrapper))
    data = folder_data(folder, "device", wrapper, on_error="skip")
    made = TrainBatches(data, seed=3, start=0, stop=5, world=ONE)
    assert made.skipped.has_news()
    assert_equal(list(made), batches(folder_data(folder, "none", wrapper, on_error="skip")))


def test_a_resumed_run_goes_on_as_a_straight_one(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures")
    run(device_config(pictures, iter_max=4), tmp_path / "straight")
    for last in (2, 4):
        run(device_config(pictures, iter_max=last), tmp_path / "resumed")
    straight, resumed = (checkpoint_of(tmp_path / name) for name in ("straight", "resumed"))
    assert not differences(straight, resumed)


def train_rank(rank: int, folder: Path, port: int) -> None:
    """One of two processes that train together."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    with world("cpu") as current:
        run(device_config(folder / "pictures", iter_max=4), folder / "two", current)


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    run(device_config(make_pictures(tmp_path / "pictures"), iter_max=4), tmp_path / "one")
    torch.multiprocessing.spawn(train_rank, (tmp_path, free_port()), nprocs=2)
    one, two = (checkpoint_of(tmp_path / count) for count in ("one", "two"))
    assert not differences(one, two)
