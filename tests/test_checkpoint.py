"""Checkpoints: what is loaded, what is refused, and what a failed save leaves behind."""

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from tests.training import model_spec
from utils import atomic
from utils.atomic import remove_leftovers, write_text
from utils.checkpoint import (
    LAST_NAME,
    RELEASE_NAME,
    build_model,
    check_same_model,
    find_weights,
    load_checkpoint,
    load_phase0,
    load_weights,
    same_norm,
    save_checkpoint,
)
from utils.errors import UserError

SPEC: dict[str, Any] = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 2}}


def make(**args: Any) -> nn.Module:
    return models.make({**SPEC, "args": {**SPEC["args"], **args}})


def content(model: nn.Module) -> dict[str, Any]:
    return {"model": {**SPEC, "sd": model.state_dict()}, "iter": 3}


def within_itself() -> dict[str, Any]:
    args: dict[str, Any] = {"nf": 8}
    args["encoder_spec"] = {"name": "carn", "args": args}
    return args


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) for key, value in first.items()
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run" / LAST_NAME
    save_checkpoint(path, content(make()))
    return path


# Loading


def test_builds_the_model_it_describes(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    model = build_model(checkpoint, saved)
    assert checkpoint["iter"] == 3 and not model.training
    assert torch.equal(
        model.state_dict()["tail_conv.bias"], checkpoint["model"]["sd"]["tail_conv.bias"]
    )


def test_prefix_of_data_parallel_is_dropped(saved: Path) -> None:
    model = make()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    save_checkpoint(saved, {"model": {**SPEC, "sd": state}})
    assert same(build_model(load_checkpoint(saved), saved), model)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_state_dict_needs_a_spec(saved: Path, prefix: str) -> None:
    model = make()
    torch.save({f"{prefix}{key}": value for key, value in model.state_dict().items()}, saved)
    checkpoint = load_checkpoint(saved)
    with pytest.raises(UserError, match="holds no model spec: name its config with --config"):
        build_model(checkpoint, saved)
    checkpoint["model"] = {**SPEC, **checkpoint["model"]}
    assert same(build_model(checkpoint, saved), model)


def test_published_weights_lack_normalisation_and_get_the_configs(saved: Path) -> None:
    state = {k: v for k, v in make().state_dict().items() if not k.startswith("norm.")}
    checkpoint = {"model": {**SPEC, "sd": state}}
    norm = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    model = build_model(checkpoint, saved, norm)
    torch.testing.assert_close(
        model.state_dict()["norm.mean"].flatten(), torch.tensor(norm["mean"])
    )


def test_weights_of_run_or_release(saved: Path) -> None:
    folder = saved.parent
    assert find_weights(folder) == saved
    saved.rename(folder / RELEASE_NAME)
    assert find_weights(folder) == folder / RELEASE_NAME
    with pytest.raises(UserError, match=r"no weights in .*train the model, or name"):
        find_weights(folder.parent)


# Refusals


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["torch", "legacy", "plain pickle"])
def test_pickle_bomb_is_refused_and_does_not_go_off(tmp_path: Path, how: str) -> None:
    path, crater = tmp_path / "bomb.pth", tmp_path / "crater"
    bomb = {"model": {**SPEC, "sd": make().state_dict()}, "iter": Bomb(crater)}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UserError, match=r"refused: .*Python objects, which could run code"):
        load_checkpoint(path)
    assert not crater.exists()


def test_whole_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(make(), path)
    with pytest.raises(UserError, match="refused: it holds Python objects"):
        load_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -100])
def test_truncated_file_is_named(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(UserError, match=r"is damaged,? or") as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"text", b"\x89PNG\r\n\x1a\n", b"\x80\x02}q\x00.", bytes(2000)])
def test_other_files_are_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "other.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"other.pth (is|refused: it is) damaged,? or"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [1],
        {"modle": 1},
        {"model": {"sd": {}}},
        {"model": {"sd": 3, "name": "carn"}},
        {"model": {"sd": {"w": torch.zeros(1)}, "name": 5}},
        {"model": {"sd": {"w": "zero"}, "name": "carn"}},
        {"model": {"sd": {"w": torch.zeros(1)}, "name": "carn"}, "ema": None},
        {"model": {"sd": {"w": torch.zeros(1)}, "name": "carn"}, "ema": {"sd": [1]}},
        {"model": {"sd": {"w": torch.zeros(1)}, "name": "carn"}, "ema": {"sd": {"w": 1.0}}},
        {"model": {"sd": {"w": torch.zeros(1).to_sparse()}, "name": "carn"}},
        {"model": {"sd": {"w": torch.zeros(1, device="meta")}, "name": "carn"}},
        {"model": {"sd": {"w": torch.zeros(1, dtype=torch.complex64)}, "name": "carn"}},
        {"model": {"sd": {"w": torch.zeros(1)}, "name": "carn", "args": within_itself()}},
        torch.zeros(3),
    ],
    ids=lambda value: str(value)[:30],
)
def test_other_contents_are_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "other.pth"
    torch.save(value, path)
    with pytest.raises(UserError, match="not one of this format"):
        load_checkpoint(path)


def test_an_old_kind_of_file_is_no_archive_whatever_it_holds(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    checkpoint["note"] = "PK\x05\x06" + " " * 18
    torch.save(checkpoint, saved, _use_new_zipfile_serialization=False)
    assert load_checkpoint(saved)["note"] == checkpoint["note"]


def test_a_single_wrong_bit_is_noticed(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        parts = [part for part in archive.infolist() if "/data/" in part.filename]
        largest = max(parts, key=lambda part: part.file_size)
    data[largest.header_offset + largest.file_size // 2 + 200] ^= 1
    saved.write_bytes(data)
    with pytest.raises(UserError, match=rf"damaged .*check sum of {largest.filename}"):
        load_checkpoint(saved)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.pth does not exist"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("tail_conv.bias"), r"missing: tail_conv.bias$"),
        (lambda sd: sd.update(more=torch.zeros(1)), "unexpected: more"),
        (
            lambda sd: sd.update({"tail_conv.bias": torch.zeros(4)}),
            r"tail_conv.bias \(4,\) instead",
        ),
        (lambda sd: [sd.pop(k) for k in list(sd) if "weight" in k], "and 6 more"),
    ],
)
def test_weights_of_another_model_are_named(saved: Path, change: Any, message: str) -> None:
    checkpoint = load_checkpoint(saved)
    change(checkpoint["model"]["sd"])
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(model, checkpoint["model"]["sd"], saved)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_spec_of_another_model_is_named() -> None:
    path = Path("x.pth")
    check_same_model(SPEC, {"name": "fsrcnn", "args": {**SPEC["args"], "s": 4}}, path)
    with pytest.raises(UserError, match="its `d` is 56, the config's is 8"):
        check_same_model(SPEC, {"name": "fsrcnn", "args": {"s": 4, "m": 1, "upscale": 2}}, path)
    with pytest.raises(UserError, match="holds `carn`, the config asks for `fsrcnn`"):
        check_same_model(SPEC, {"name": "carn"}, path)


def test_phase1_takes_backbone_and_heavy_upsampler_alone() -> None:
    encoder = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "no_upsampling": True}}

    def liif(*hidden: int) -> dict[str, Any]:
        imnet = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
        return {"name": "liif-sampler", "args": {"imnet_spec": imnet}}

    args = {"encoder_spec": encoder, "heavy_sampler_spec": liif(6)}
    phase0 = models.make({"name": "pcsr-phase0", "args": args})
    light = {"light_sampler_spec": liif(4), "classifier_spec": liif()}
    phase1 = models.make({"name": "pcsr-phase1", "args": {**args, **light}})
    before: dict[str, Tensor] = {k: v.clone() for k, v in phase1.state_dict().items()}
    load_phase0(phase1, phase0.state_dict(), "phase0.pth")
    for key, value in phase1.state_dict().items():
        own = key.startswith(("light_sampler", "classifier"))
        assert torch.equal(value, before[key] if own else phase0.state_dict()[key])


# Saving


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    folder = tmp_path / "full"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_the_old_checkpoint_survives(full_disk: Path) -> None:
    path = full_disk / LAST_NAME
    save_checkpoint(path, content(make()))
    before = path.read_bytes()
    large = {**content(make()), "more": torch.zeros(100_000)}
    with pytest.raises(UserError, match=r"No space left on device; the one before is kept$"):
        save_checkpoint(path, large)
    assert path.read_bytes() == before
    assert list(full_disk.iterdir()) == [path]
    with pytest.raises(UserError, match=r"No space left on device; nothing was written$"):
        save_checkpoint(full_disk / "other.pth", large)
    assert list(full_disk.iterdir()) == [path]


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot save .*file/iter_last.pth"):
        save_checkpoint(tmp_path / "file" / LAST_NAME, content(make()))


def test_a_killed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: int) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    monkeypatch.setattr(atomic.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, content(make()))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / LAST_NAME
    leftover = tmp_path / ".iter_last.123-abc.tmp.pth"
    others = [path, tmp_path / ".iter_last.pth", tmp_path / ".other.1.tmp.pth"]
    for file in (leftover, *others):
        write_text(file, "x")
    remove_leftovers(path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_phase1_takes_no_light_upsampler_from_a_data_parallel_phase1() -> None:
    spec = model_spec("fsrcnn-phase1")
    model, other = models.make(spec), models.make(spec)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other.state_dict()
    load_phase0(model, {f"module.{key}": value for key, value in state.items()}, "p.pth")
    for key, value in model.state_dict().items():
        own = key.startswith(("light_sampler", "classifier"))
        assert torch.equal(value, before[key] if own else state[key])


def test_norms_are_the_same_but_for_half_precision() -> None:
    norm = torch.tensor([0.4488, 0.4371, 0.4040])
    assert same_norm(norm.half(), norm)
    assert not same_norm(norm + 0.01, norm)
