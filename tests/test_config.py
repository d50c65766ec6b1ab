"""Config files: every key and every type is checked, and the message names the key."""

from pathlib import Path

import pytest
import yaml

from utils.config import Config, dump_yaml, load_config
from utils.errors import UserError

TEXT = """
phase: 0
seed: 0
train_dataset:
  dataset: {name: image-folder, args: {root_path: pictures}}
  wrapper: {name: sr-implicit-downsampled, args: {scale: [4, 4]}}
  batch_size: 16
valid_dataset: null
model: {name: carn, args: {nf: 8}}
optimizer: {name: adam, args: {lr: 2e-4}}
iter_max: 2e6
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "my-carn.yaml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Config:
    return load_config(path, overrides)


def test_values_have_their_types(path: Path) -> None:
    config = load(path)
    assert config.name == "my-carn"
    assert config.seed == 0 and config.phase == 0
    assert config.iter_max == 2_000_000 and isinstance(config.iter_max, int)
    assert config.optimizer == {"name": "adam", "args": {"lr": 0.0002}}
    assert config.train_dataset is not None and config.train_dataset.batch_size == 16
    assert config.valid_dataset is None
    assert (config.psnr_type, config.patch_size, config.step) == ("y", 32, 28)


@pytest.mark.parametrize("text", ["2e-4", "2.e-4", "0.2e-3", "+2E-4", ".2e-3", "0.0002"])
def test_scientific_notation_is_a_number(path: Path, text: str) -> None:
    config = load(path, f"optimizer.args.lr={text}")
    assert config.optimizer is not None and config.optimizer["args"]["lr"] == pytest.approx(2e-4)


def test_overrides_reach_any_depth_and_make_what_is_missing(path: Path) -> None:
    config = load(
        path,
        "model.args.nf=16",
        "train_dataset.dataset={name: image-folder, args: {root_path: a=b}}",
        "lr_scheduler.name=CosineAnnealingLR_Restart",
        "lr_scheduler.args.T_period=[5]",
        "seed=",
    )
    assert config.model["args"] == {"nf": 16}
    assert config.train_dataset is not None
    assert config.train_dataset.dataset["args"]["root_path"] == "a=b"
    assert config.lr_scheduler is not None and config.lr_scheduler["args"] == {"T_period": [5]}
    assert config.seed is None
    assert config.raw["model"]["args"] == {"nf": 16}


def test_resolved_config_reads_as_the_same(path: Path, tmp_path: Path) -> None:
    config = load(path, "optimizer.args.lr=1e-7", "seed=3")
    again = tmp_path / "resolved" / "my-carn.yaml"
    again.parent.mkdir()
    again.write_text(dump_yaml(config.raw), encoding="utf-8")
    assert load(again) == config


def test_anchors_and_merges_work(path: Path) -> None:
    path.write_text(
        "model: &m {name: carn, args: {nf: 8}}\noptimizer: {<<: *m, name: adam}\n",
        encoding="utf-8",
    )
    assert load(path).optimizer == {"name": "adam", "args": {"nf": 8}}


def test_an_override_changes_one_of_two_places_that_share_an_anchor(path: Path) -> None:
    path.write_text(
        "model: {name: carn}\n"
        "train_dataset: &d {dataset: {name: a}, wrapper: {name: b}, batch_size: 4}\n"
        "valid_dataset: *d\n",
        encoding="utf-8",
    )
    config = load(path, "train_dataset.batch_size=2", "valid_dataset.dataset.name=c")
    assert config.train_dataset is not None and config.valid_dataset is not None
    assert (config.train_dataset.batch_size, config.valid_dataset.batch_size) == (2, 4)
    assert (config.train_dataset.dataset, config.valid_dataset.dataset) == (
        {"name": "a"},
        {"name": "c"},
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iter_mx=3", r"unknown key `iter_mx` \(did you mean `iter_max`\?\)"),
        ("train_dataset.batchsize=3", r"`train_dataset.batchsize` \(did you mean `batch_size`\?\)"),
        ("train_dataset=3", "`train_dataset` must be a mapping"),
        ("train_dataset.wrapper=null", "`train_dataset.wrapper` is missing"),
        ("train_dataset.batch_size=0", "`train_dataset.batch_size` must be 1 or more, not 0"),
        ("train_dataset.batch_size=many", "must be a whole number, not 'many'"),
        ("model=null", "key `model` is missing"),
        ("model=carn", "`model` must be a mapping, not 'carn'"),
        ("phase=2", "`phase` must be one of 0, 1, not 2"),
        ("psnr_type=rgbb", "`psnr_type` must be one of rgb, y"),
        ("precision=fp16", "`precision` must be one of fp32, bf16"),
        ("seed=-1", "`seed` must be 0 or more, not -1"),
        ("seed=9223372036854775808", r"`seed` must be below 2\^63"),
        ("seed=0.5", "`seed` must be a whole number, not 0.5"),
        ("iter_max=true", "`iter_max` must be a whole number, not True"),
        ("iter_save=0", "`iter_save` must be 1 or more"),
        ("iter_save_s=-1", "`iter_save_s` must be 0 or more"),
        ("loss_rgb_w=.nan", "`loss_rgb_w` must be a number"),
        ("channels_last=1", "`channels_last` must be true or false, not 1"),
        ("valid_dataset={dataset: {}, wrapper: {}, scales: [4, x]}", "must be a list of numbers"),
        ("init=5", "`init` must be text, not 5"),
        ("iter_max", "--set iter_max: expected key.path=value"),
        ("=5", "--set =5: expected key.path=value"),
        ("model.name.x=1", "`name` is not a mapping"),
        ("iter_max=[1", r"--set iter_max=\[1"),
    ],
)
def test_wrong_values_are_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(path, override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {name: a}\nmodel: {name: b}\n", r"key `model` is given twice \(line 2\)"),
        ("model: {name: a, args: {nf: 1, nf: 2}}\n", "key `nf` is given twice"),
        ("? [a]\n: 1\n", r"a key must be a plain word \(line 1\)"),
        ("model: [1\n", "broken.yaml: expected"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("- 1\n", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("1: 2\nmodel: {name: a}\n", "unknown key `1`"),
        ("model: &a {name: b, args: *a}\n", "nested without end, or too deeply"),
        (f"model: {'[' * 2000}{']' * 2000}\n", "nested without end, or too deeply"),
        (f"model: {'[' * 60}{']' * 60}\n", "nested without end, or too deeply"),
        (
            "a: &x0 [1]\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1}, ' * 9}]\n" for n in range(1, 9)),
            "nested without end, or too deeply",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "picture.yaml"
    binary.write_bytes(b"\x89PNG\xff")
    for path, message in (
        (tmp_path / "no.yaml", "no.yaml does not exist"),
        (tmp_path, "Is a directory"),
        (binary, "no UTF-8 text"),
    ):
        with pytest.raises(UserError, match=message):
            load(path)


def test_yaml_stays_plain(path: Path) -> None:
    assert yaml.safe_load(dump_yaml(load(path).raw))["model"] == {"name": "carn", "args": {"nf": 8}}
