"""What training refuses, in one line that names it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.trainer import Trainer
from tests.training import make_pictures, metrics_of, raw_config, run
from utils.checkpoint import LAST_NAME
from utils.config import check_config
from utils.errors import UserError
from utils.images import Picture, read_rgb, write_picture
from utils.log import set_up

pytestmark = pytest.mark.usefixtures("fresh_logging")

MLP = "model.args.heavy_sampler_spec.args.imnet_spec.args.hidden_list"


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`raw` with one key replaced, or removed where `value` is None."""
    *parents, last = path.split(".")
    node = raw
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return raw


@pytest.mark.parametrize(
    ("kind", "path", "value", "message"),
    [
        ("fsrcnn", "train_dataset", None, "key `train_dataset` is missing"),
        ("fsrcnn", "optimizer", None, "key `optimizer` is missing"),
        ("fsrcnn", "iter_max", None, "key `iter_max` is missing"),
        ("fsrcnn", "scale", 2, "`scale` is 2, but the model is built for 4"),
        ("fsrcnn", "phase", 0, "`phase` is 0, but `model` is `fsrcnn`, not PCSR"),
        ("fsrcnn", "model.args", {"no_upsampling": True}, "is no original network"),
        ("fsrcnn", "model.args", {"upscale": 2}, "enlarges 2 times, .* scale is 4"),
        ("carn-phase0", "phase", 1, "`phase` is 1, but `model`, `pcsr-phase0`, has no classifier"),
        ("carn-phase1", "phase", 0, "`phase` is 0, but `model`, `pcsr-phase1`, has a classifier"),
        ("carn-phase0", MLP, [4, 0], r"`hidden_list` takes widths of 1 or more, not \[4, 0\]"),
        ("fsrcnn", "optimizer.name", "sgd", "unknown optimizer `sgd`; known: adam"),
        ("fsrcnn", "optimizer.args.lr", 0, "`optimizer.args.lr` must be positive"),
        ("fsrcnn", "lr_scheduler.name", "Cosine", "known: CosineAnnealingLR_Restart"),
        ("fsrcnn", "train_dataset.dataset.name", "folder", "known: image-folder, paired"),
        ("fsrcnn", "train_dataset.wrapper.name", "sr", "known: sr-implicit-downsampled"),
        ("fsrcnn", "train_dataset.dataset.args.root_path", "/no/such", "/no/such"),
        ("fsrcnn", "train_dataset.wrapper.args.inp_size", 99, r"\d.png is 48x48, too small"),
    ],
)
def test_wrong_configs_are_named(
    kind: str, path: str, value: Any, message: str, pictures: Path, tmp_path: Path, phase0: Any
) -> None:
    init = str(phase0(kind) / LAST_NAME) if kind.endswith("phase1") else None
    config = check_config(changed(raw_config(kind, pictures), path, value), kind)
    if config.phase == 1:
        init = str(phase0("carn-phase1") / LAST_NAME)
    with pytest.raises(UserError, match=message) as caught:
        run(config, tmp_path / "run", init=init)
    assert "\n" not in str(caught.value)


def test_validation_at_another_scale_is_refused_before_training(
    pictures: Path, tmp_path: Path
) -> None:
    raw = raw_config("fsrcnn", pictures)
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    dataset = raw["train_dataset"]["dataset"]
    raw["valid_dataset"] = {"dataset": dataset, "wrapper": wrapper, "scales": [3]}
    with pytest.raises(UserError, match="enlarges 4 times, but is to be validated at scale 3"):
        run(check_config(raw, "x"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("wrapper", "width", "message"),
    [
        ({"scale": 4}, 11, "too small for scale 4: nothing is left inside a border of 4 px"),
        ({"scale": 4}, 3, "too small for scale 4"),
        ({"scale": 1.4}, 2, "nothing is left inside a border of 1 px"),
        ({"scale": 4, "inp_size": 8}, 31, "too small for a crop of 32x32"),
        ({"scale": 2.5, "inp_size": 5}, 11, "too small for a crop of 12x12"),
    ],
)
def test_validation_pictures_that_are_too_small_are_found_before_training(
    wrapper: dict[str, Any], width: int, message: str, tmp_path: Path
) -> None:
    folder = make_pictures(tmp_path / "pictures")
    last = folder / "last.png"
    raw = raw_config("fsrcnn-phase0", make_pictures(tmp_path / "training"), iter_max=1)
    dataset = {"name": "image-folder", "args": {"root_path": str(folder)}}
    raw["valid_dataset"] = {
        "dataset": dataset,
        "wrapper": {"name": "sr-implicit-downsampled", "args": wrapper},
    }
    write_picture(last, Picture(np.zeros((48, width, 3), np.uint8)))
    with pytest.raises(UserError, match=message) as caught:
        run(check_config(raw, "x"), tmp_path / "run")
    assert f"{last} is {width}x48" in str(caught.value)
    assert not (tmp_path / "run").exists()
    # One pixel of LR more is enough.
    write_picture(last, Picture(np.zeros((48, width + (9 if width == 3 else 1), 3), np.uint8)))
    run(check_config(raw, "x"), tmp_path / "run")
    assert metrics_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("size", "scales", "message"),
    [
        ((2, 12), [], r"last\.png is 48x8, too small for scale 4: nothing is left"),
        ((5, 12), [], "no common scale"),
        ((4, 24), [], r"last\.png is 2 times its LR last\.png, not 4"),
        (None, [2], r"0\.png is 4 times its LR 0\.png, not 2"),
    ],
)
def test_validation_pairs_that_cannot_be_are_found_before_training(
    size: tuple[int, int] | None, scales: list[float], message: str, tmp_path: Path
) -> None:
    hr = make_pictures(tmp_path / "hr")
    for path in hr.iterdir():
        small = np.ascontiguousarray(read_rgb(path)[::4, ::4])
        write_picture(tmp_path / "lr" / path.name, Picture(small))
    if size is not None:
        write_picture(hr / "last.png", Picture(np.zeros((8, 48, 3), np.uint8)))
        write_picture(tmp_path / "lr" / "last.png", Picture(np.zeros((*size, 3), np.uint8)))
    raw = raw_config("fsrcnn-phase0" if scales else "fsrcnn", make_pictures(tmp_path / "training"))
    args = {"root_path_hr": str(hr), "root_path_lr": str(tmp_path / "lr")}
    raw["valid_dataset"] = {
        "dataset": {"name": "paired-image-folders", "args": args},
        "wrapper": {"name": "sr-implicit-paired"},
        "scales": scales,
    }
    with pytest.raises(UserError, match=message):
        run(check_config(raw, "x"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_pairs_tell_their_scale(tmp_path: Path) -> None:
    hr = make_pictures(tmp_path / "hr")
    for path in hr.iterdir():
        small = np.ascontiguousarray(read_rgb(path)[::4, ::4])
        write_picture(tmp_path / "lr" / path.name, Picture(small))
    raw = raw_config("fsrcnn", make_pictures(tmp_path / "training"), iter_max=1)
    args = {"root_path_hr": str(hr), "root_path_lr": str(tmp_path / "lr")}
    raw["valid_dataset"] = {
        "dataset": {"name": "paired-image-folders", "args": args},
        "wrapper": {"name": "sr-implicit-paired"},
    }
    assert run(check_config(raw, "x"), tmp_path / "run") == 0
    scales = [row["scale"] for row in metrics_of(tmp_path / "run") if row["kind"] == "valid"]
    assert scales == [4]


def test_a_lack_of_memory_says_what_to_do(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def iterate(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(Trainer, "_iterate", iterate)
    with pytest.raises(UserError, match=r"not enough memory to train: .*`accumulate: 2`"):
        run(check_config(raw_config("fsrcnn", pictures), "x"), tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_picture_is_named_in_one_line(
    workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = make_pictures(tmp_path / "pictures")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    raw = raw_config("fsrcnn", folder)
    raw["train_dataset"]["num_workers"] = workers
    raw["train_dataset"]["dataset"]["args"]["cache"] = "none"
    with pytest.raises(UserError, match=r"3\.png") as caught:
        run(check_config(raw, "x"), tmp_path / "run")
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_folder_that_cannot_be_one_is_refused_before_any_image_is_read(tmp_path: Path) -> None:
    """Nothing is made, and no picture is missed yet."""
    config = check_config(raw_config("fsrcnn", tmp_path / "no pictures"), "fsrcnn-x4")
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "run"):
        with pytest.raises(UserError, match=r"--save_dir .*: .*file is not a writable folder"):
            run(config, folder)
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train_dataset.wrapper.args.scale", [2, 2], "the training data's scale is 2"),
        ("train_dataset.wrapper.args.inp_size", 500, "too small"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_a_run_is_touched(
    path: str, value: Any, message: str, tmp_path: Path
) -> None:
    raw = raw_config("fsrcnn", make_pictures(tmp_path / "pictures"), iter_max=2)
    folder = tmp_path / "run"
    run(check_config(raw, "x"), folder)
    set_up()  # the log is closed
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for resume, end in (("never", 2), ("auto", 4)):
        wrong = changed({**raw, "iter_max": end}, path, value)
        with pytest.raises(UserError, match=message):
            run(check_config(wrong, "x"), folder, resume=resume)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_whole_images_of_different_sizes_need_inp_size(tmp_path: Path) -> None:
    folder = make_pictures(make_pictures(tmp_path / "p", count=5).parent / "p", 1, side=32)
    raw = raw_config("fsrcnn", folder)
    del raw["train_dataset"]["wrapper"]["args"]["inp_size"]
    with pytest.raises(UserError, match=r"`train_dataset.wrapper.args.inp_size` is missing"):
        run(check_config(raw, "x"), tmp_path / "run")


def test_pairs_of_several_scales_in_one_batch(tmp_path: Path) -> None:
    hr = make_pictures(tmp_path / "hr", count=6, side=48)
    lr = tmp_path / "lr"
    lr.mkdir()
    for index, path in enumerate(sorted(hr.iterdir())):
        side = 12 if index % 2 else 24
        write_picture(lr / path.name, Picture(np.zeros((side, side, 3), np.uint8)))
    raw = raw_config("fsrcnn", hr)
    args = {"root_path_hr": str(hr), "root_path_lr": str(lr), "cache": "none"}
    raw["train_dataset"]["dataset"] = {"name": "paired-image-folders", "args": args}
    raw["train_dataset"]["wrapper"] = {"name": "sr-implicit-paired", "args": {"inp_size": 8}}
    with pytest.raises(UserError, match="pairs of several scales are in one batch"):
        run(check_config(raw, "x"), tmp_path / "run")
