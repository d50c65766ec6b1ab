"""Image folders, pairs, caches and the samples made of them."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import DATASETS, WRAPPERS, make, make_wrapper
from datasets.folders import ImageFolder, PairedImageFolders
from datasets.pairing import align_pair, pair_by_name
from datasets.resize import imresize, imresize_uint8
from datasets.sampling import SampleKey
from engine.data import TrainBatches, validation_sets
from tests.processes import REPOSITORY, needs_name
from utils.config import DataConfig
from utils.distributed import World
from utils.errors import UserError
from utils.images import Picture, read_rgb, to_tensor, write_picture


def write_images(folder: Path, sizes: dict[str, tuple[int, int]], seed: int = 0) -> Path:
    """Write noise images; `sizes` maps file names to (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for name, (height, width) in sizes.items():
        rgb = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_picture(folder / name, Picture(rgb))
    return folder


def folder_of(path: Path, **args: object) -> ImageFolder:
    return make({"name": "image-folder", "args": {"root_path": str(path), **args}})


def downsampled(dataset: object, **args: object) -> torch.utils.data.Dataset:
    return make_wrapper({"name": "sr-implicit-downsampled", "args": args}, dataset)


def pairs_of(hr: Path, lr: Path, **args: object) -> PairedImageFolders:
    args = {"root_path_hr": str(hr), "root_path_lr": str(lr), **args}
    return make({"name": "paired-image-folders", "args": args})


def test_published_names_are_registered() -> None:
    assert DATASETS.names() == ["image-folder", "paired-image-folders"]
    assert WRAPPERS.names() == ["sr-implicit-downsampled", "sr-implicit-paired"]


@pytest.mark.parametrize("cache", ["none", "in_memory", "lmdb"])
def test_caches_give_the_same_images(tmp_path: Path, cache: str) -> None:
    folder = write_images(tmp_path / "in", {"b.png": (8, 9), "a.webp": (7, 5), "c.bmp": (6, 6)})
    data = folder_of(folder, cache=cache, first_k=2, repeat=3, cache_dir=str(tmp_path / "cache"))
    assert data.names == ["a.webp", "b.png"] * 3
    assert len(data) == 6
    copy = pickle.loads(pickle.dumps(data))
    for dataset in (data, copy):
        np.testing.assert_array_equal(dataset[3], read_rgb(folder / "b.png"))
    with pytest.raises(IndexError):
        data[6]


def test_lmdb_is_readable_before_and_after_a_fork(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", {"a.png": (8, 8), "b.png": (8, 8)})
    data = folder_of(folder, cache="lmdb", cache_dir=str(tmp_path / "cache"))
    wrapped = downsampled(data, scale=2)
    here = [wrapped[index] for index in range(2)]
    loader = DataLoader(wrapped, num_workers=2, multiprocessing_context="fork")
    for sample, batch in zip(here, loader, strict=True):
        assert torch.equal(batch["hr"][0], sample["hr"])
    other = folder_of(folder, cache="lmdb", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(other[0], data[0])


def test_lmdb_is_made_anew_when_a_file_changes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", {"a.png": (8, 9), "b.png": (5, 5)})
    arguments = {"cache": "lmdb", "cache_dir": str(tmp_path / "cache")}
    folder_of(folder, **arguments).load()
    (database,) = (tmp_path / "cache").iterdir()
    built = database.stat().st_mtime_ns
    # Fewer of the same images need no new file.
    first = folder_of(folder, first_k=1, **arguments)
    assert first[0].shape == (8, 9, 3)
    assert database.stat().st_mtime_ns == built
    write_images(folder, {"a.png": (6, 4)}, seed=1)
    os.utime(folder / "a.png", ns=(1, 1))
    changed = folder_of(folder, **arguments)
    changed.load()
    np.testing.assert_array_equal(changed[0], read_rgb(folder / "a.png"))
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [database.name]
    assert sorted(entry.name for entry in folder.iterdir()) == ["a.png", "b.png"]


def test_lmdb_keeps_apart_what_links_of_one_name_lead_to(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for seed in (0, 1):
        folder = write_images(tmp_path / f"scene{seed}", {"HR.png": (5, 5)}, seed=seed)
        (links / f"{seed}.png").symlink_to(folder / "HR.png")
    stored = folder_of(links, cache="lmdb", cache_dir=str(tmp_path / "cache"))
    for index in range(2):
        np.testing.assert_array_equal(stored[index], folder_of(links)[index])
    assert not np.array_equal(stored[0], stored[1])


def test_what_a_killed_process_left_of_an_lmdb_goes(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", {"a.png": (8, 9)})
    cache = tmp_path / "cache"
    cache.mkdir()
    build = (
        "import os, signal, sys\n"
        "from datasets import cache\n"
        "from tests.test_datasets import folder_of\n"
        "cache.read_bytes = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder_of(sys.argv[1], cache='lmdb', cache_dir=sys.argv[2]).load()\n"
    )
    words = [sys.executable, "-c", build, str(folder), str(cache)]
    assert subprocess.run(words, cwd=REPOSITORY).returncode == -signal.SIGKILL
    assert len(list(cache.iterdir())) == 2, "a part of the LMDB, and the lock"
    (cache / ".other.tmp").touch()
    folder_of(folder, cache="lmdb", cache_dir=str(cache)).load()
    (database,) = cache.glob("*.lmdb")
    assert set(cache.iterdir()) == {database, cache / ".other.tmp"}


@pytest.mark.parametrize("name", ["a" * 250, "\N{CJK UNIFIED IDEOGRAPH-56FE}" * 80, "\udcff\udcfe"])
def test_an_lmdb_of_a_folder_of_any_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_name(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_images(tmp_path / name, {"a.png": (8, 9)})
    stored = folder_of(folder, cache="lmdb", cache_dir="~/cache")
    np.testing.assert_array_equal(stored[0], folder_of(folder)[0])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_processes_that_build_the_same_lmdb_at_once(tmp_path: Path) -> None:
    folders = [write_images(tmp_path / str(i), {"a.png": (8, 9)}, seed=i) for i in range(60)]
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8, timeout=20)

    def build() -> None:
        for folder in folders:
            barrier.wait()
            folder_of(folder, cache="lmdb", cache_dir=str(tmp_path / "cache")).load()

    processes = [context.Process(target=build) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(list((tmp_path / "cache").iterdir())) == len(folders)


def test_lmdb_without_the_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_images(tmp_path / "in", {"a.png": (8, 9)})
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UserError, match="pip install lmdb"):
        folder_of(folder, cache="lmdb").load()


def test_damaged_images_and_bad_arguments_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", {"a.png": (8, 9)})
    with pytest.raises(UserError, match=r"did you mean `in_memory`"):
        folder_of(folder, cache="inmemory")
    with pytest.raises(UserError, match="first_k"):
        folder_of(folder, first_k=0)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:90])
    with pytest.raises(UserError, match=r"b\.png"):
        folder_of(folder, cache="in_memory").load()
    with pytest.raises(UserError, match=r"b\.png"):
        downsampled(folder_of(folder), scale=2)[1]


@pytest.mark.parametrize("cache", ["none", "in_memory", "lmdb"])
def test_damaged_images_can_be_skipped(tmp_path: Path, cache: str) -> None:
    folder = write_images(tmp_path / "in", dict.fromkeys(("a.png", "b.png", "c.png"), (8, 9)))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:90])
    (folder / "c.png").write_bytes(b"")
    arguments = {"cache": cache, "cache_dir": str(tmp_path / "cache"), "repeat": 2}
    data = folder_of(folder, on_error="skip", **arguments)
    for index in range(6):
        np.testing.assert_array_equal(data[index], read_rgb(folder / "a.png"))
        assert data.name(index) == "a.png"
    assert data.has_untold()
    told = data.untold()
    assert [Path(path).name for path in told] == ["b.png", "c.png"]
    assert all(path in reason for path, reason in told.items())
    assert not data.has_untold() and not data.untold()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image in .* can be read, for example: .*[abc]\.png"):
        folder_of(folder, on_error="skip", **arguments)[0]
    with pytest.raises(UserError, match=r"[abc]\.png"):
        folder_of(folder, **arguments)[0]


@pytest.mark.parametrize(
    ("hr", "lr"),
    [
        ("0801.png", "0801x4.png"),
        ("0801.png", "0801_x4.jpg"),
        ("0801.png", "0801x4m.png"),
        ("baby.png", "baby_LRBI_x4.png"),
        ("baby.png", "babyLRx4.png"),
        ("img_001_HR.png", "img_001_LR.png"),
        ("baby_HR_x4.png", "baby_LR_x4.png"),
        ("box4.png", "box4.png"),
        ("box4.png", "box4x4.png"),
    ],
)
def test_names_that_pair(hr: str, lr: str) -> None:
    assert pair_by_name([Path(hr)], [Path(lr)]) == [(Path(hr), Path(lr))]


def test_pairing_ignores_the_order_and_refuses_orphans_and_doubles() -> None:
    hr = [Path(f"hr/{n}.png") for n in ("2", "10", "1")]
    lr = [Path(f"lr/{n}.png") for n in ("10x2", "1x2", "2x2")]
    assert [(a.stem, b.stem) for a, b in pair_by_name(hr, lr)] == [
        ("2", "2x2"),
        ("10", "10x2"),
        ("1", "1x2"),
    ]
    with pytest.raises(UserError, match=r"1 HR and 1 LR .*HR 1\.png, LR 3x2\.png"):
        pair_by_name(hr, [*lr[:1], Path("lr/3x2.png"), *lr[2:]])
    with pytest.raises(UserError, match=r"HR 0\.png.*HR 4\.png and 3 more"):
        pair_by_name([Path(f"hr/{n}.png") for n in range(9)], [Path("lr/8.png")])
    with pytest.raises(UserError, match="more than one file for `1`"):
        pair_by_name([Path("1.png")], [Path("1x2.png"), Path("1x4.png")])


def test_pairs_share_a_whole_scale() -> None:
    def image(height: int, width: int) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)

    hr, lr, scale = align_pair(image(33, 43), image(8, 11), "a")
    assert (hr.shape, lr.shape, scale) == ((32, 40, 3), (8, 10, 3), 4)
    with pytest.raises(UserError, match=r"0803\.png is 480x320, its LR 100x80: no common scale"):
        align_pair(image(320, 480), image(80, 100), "0803.png")


def test_whole_images_are_cropped_to_the_scale(tmp_path: Path) -> None:
    data = folder_of(write_images(tmp_path, {"a.png": (23, 17)}))
    rgb = read_rgb(tmp_path / "a.png")
    sample = downsampled(data, scale=4)[0]
    assert torch.equal(sample["hr"], to_tensor(rgb[:20, :16]))
    assert torch.equal(sample["lr"], imresize(sample["hr"], 0.25))
    sample = downsampled(data, scale=[2, 2.7])[0]
    assert sample["lr"].shape == (3, 8, 6)
    assert sample["hr"].shape == (3, 22, 16)
    sample = downsampled(data, scale=4, lr_mode="uint8")[0]
    assert torch.equal(sample["lr"], to_tensor(imresize_uint8(rgb[:20, :16], 0.25)))


def test_crops_are_central_by_index_and_random_by_key(tmp_path: Path) -> None:
    data = folder_of(write_images(tmp_path, {"a.png": (40, 30)}), cache="in_memory")
    rgb = read_rgb(tmp_path / "a.png")
    wrapped = downsampled(data, scale=2, inp_size=8, augment=["hflip", "vflip", "dflip"])
    assert torch.equal(wrapped[0]["hr"], to_tensor(rgb[12:28, 7:23]))
    keyed = [wrapped[SampleKey(0, position, 0, 0)] for position in range(20)]
    assert len({sample["hr"].numpy().tobytes() for sample in keyed}) == 20
    again = wrapped[SampleKey(0, 7, 99, 0)]
    assert torch.equal(again["hr"], keyed[7]["hr"])
    for sample in keyed:
        torch.testing.assert_close(sample["lr"], imresize(sample["hr"], 0.5))


def test_augmentation_gives_all_eight_orientations_equally_often(tmp_path: Path) -> None:
    data = folder_of(write_images(tmp_path, {"a.png": (4, 4)}), cache="in_memory")
    wrapped = downsampled(data, scale=1, inp_size=4, augment=True)
    counts: dict[bytes, int] = {}
    for position in range(800):
        pixels = wrapped[SampleKey(0, position, 0, 0)]["hr"].numpy().tobytes()
        counts[pixels] = counts.get(pixels, 0) + 1
    assert len(counts) == 8
    assert min(counts.values()) > 70


def test_too_small_images_and_unknown_flips_are_named(tmp_path: Path) -> None:
    data = folder_of(write_images(tmp_path, {"tiny.png": (30, 3)}))
    with pytest.raises(UserError, match=r"tiny\.png is 3x30, too small for a crop of 32x32"):
        downsampled(data, scale=4, inp_size=8)[0]
    with pytest.raises(UserError, match=r"tiny\.png is 3x30, too small for scale 4"):
        downsampled(data, scale=4)[0]
    with pytest.raises(UserError, match="did you mean `hflip`"):
        downsampled(data, scale=4, augment=["hflipp"])
    with pytest.raises(UserError, match="min at most max"):
        downsampled(data, scale=[4, 2])
    with pytest.raises(UserError, match="scale` is missing"):
        downsampled(data)
    with pytest.raises(UserError, match="paired-image-folders"):
        make_wrapper({"name": "sr-implicit-paired"}, data)


def test_pair_with_a_damaged_image_is_skipped(tmp_path: Path) -> None:
    hr = write_images(tmp_path / "hr", {"a.png": (8, 8), "b.png": (8, 8)})
    lr = write_images(tmp_path / "lr", {"a.png": (4, 4), "b.png": (4, 4)})
    (lr / "a.png").write_bytes(b"")
    pairs = pairs_of(hr, lr, on_error="skip")
    np.testing.assert_array_equal(pairs[0].hr, read_rgb(hr / "b.png"))
    np.testing.assert_array_equal(pairs[0].lr, read_rgb(lr / "b.png"))
    with pytest.raises(UserError, match="on_error` must be one of stop, skip"):
        pairs_of(hr, lr, on_error="ignore")


def test_a_misspelt_wrapper_key_is_found_before_images_are_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    dataset = {"name": "image-folder", "args": {"root_path": str(tmp_path), "cache": "in_memory"}}
    args = {"inp_size": 8, "scale": 4, "augmnt": True}
    data = DataConfig(dataset, {"name": "sr-implicit-downsampled", "args": args})
    with pytest.raises(UserError, match="did you mean `augment`"):
        TrainBatches(data, seed=0, start=0, stop=1, world=World(0, 1, torch.device("cpu")))


def test_validation_never_skips(tmp_path: Path) -> None:
    write_images(tmp_path, {"a.png": (8, 8), "b.png": (8, 8)})
    (tmp_path / "a.png").write_bytes(b"no picture")
    dataset = {"name": "image-folder", "args": {"root_path": str(tmp_path), "on_error": "skip"}}
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    (_, samples), *_ = validation_sets(DataConfig(dataset, wrapper))
    with pytest.raises(UserError, match=r"a\.png"):
        samples[0]


def test_paired_crops_stay_aligned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    hr_folder = write_images(tmp_path / "hr", {"a.png": (40, 30), "b.png": (24, 28)})
    (tmp_path / "lr").mkdir()
    for name in "ab":
        lr = read_rgb(hr_folder / f"{name}.png")[::2, ::2]
        write_picture(tmp_path / "lr" / f"{name}x2.png", Picture(np.ascontiguousarray(lr)))
    data = pairs_of(hr_folder, tmp_path / "lr", cache="in_memory", repeat=2)
    assert data.names == ["a.png", "b.png"] * 2
    spec = {"name": "sr-implicit-paired", "args": {"inp_size": 8, "augment": ["hflip", "dflip"]}}
    wrapped = make_wrapper(spec, data)
    for key in [1, *(SampleKey(0, position, 0, 0) for position in range(12))]:
        sample = wrapped[key]
        assert sample["hr"].shape == (3, 16, 16)
        # Every LR pixel is one of its four HR pixels, wherever the flips have put it.
        corners = [sample["hr"][:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        assert any(torch.equal(sample["lr"], corner) for corner in corners)
    whole = make_wrapper({"name": "sr-implicit-paired"}, data)[0]
    assert whole["lr"].shape == (3, 20, 15)


def test_lmdb_is_made_anew_when_a_file_of_the_same_size_is_newer(tmp_path: Path) -> None:
    arguments = {"cache": "lmdb", "cache_dir": str(tmp_path / "cache")}
    for seed in (0, 1):
        folder = write_images(tmp_path / "in", {"a.bmp": (8, 9)}, seed)
        os.utime(folder / "a.bmp", ns=(seed, seed))
        data = folder_of(folder, **arguments)
        np.testing.assert_array_equal(data[0], read_rgb(folder / "a.bmp"))


def test_an_lr_image_that_is_a_row_short_is_of_no_scale() -> None:
    hr, lr = np.zeros((48, 48, 3), np.uint8), np.zeros((11, 12, 3), np.uint8)
    with pytest.raises(UserError, match="no common scale"):
        align_pair(hr, lr, "a.png")
