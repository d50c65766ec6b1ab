"""The mean of several runs' weights (utils.average)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.pcsr import PCSR
from tests.processes import REPOSITORY
from tests.training import model_spec
from utils.average import average
from utils.checkpoint import build_model, load_checkpoint, save_checkpoint
from utils.errors import UserError


def write(path: Path, seed: int, kind: str = "fsrcnn", **more: Any) -> Path:
    """A checkpoint of random weights; batch norm has statistics and has counted."""
    torch.manual_seed(seed)
    spec = model_spec(kind)
    model = models.make(spec)
    for key, value in model.state_dict().items():
        if key.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand_like(value) + 0.5)
        elif key.endswith("num_batches_tracked"):
            value.fill_(seed)
    save_checkpoint(path, {"model": {**spec, "sd": model.state_dict()}, "iter": 10 * seed, **more})
    return path


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]["sd"]


@pytest.mark.parametrize("kind", ["fsrcnn", "carn", "carn-phase1"])
def test_every_weight_is_the_mean(kind: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.pth", seed, kind) for seed in (1, 2, 3)]
    found = average(paths)
    assert found["iter"] == 10
    states = [state_of(path) for path in paths]
    assert found["model"]["sd"].keys() == states[0].keys()
    counted = 0
    for key, value in found["model"]["sd"].items():
        theirs = [state[key] for state in states]
        assert value.dtype == theirs[0].dtype
        if value.is_floating_point():
            expected = ((theirs[0].double() + theirs[1].double() + theirs[2].double()) / 3).float()
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
            counted += not torch.equal(theirs[0], theirs[1])
        else:
            assert torch.equal(value, theirs[0])
    assert counted > 5
    model = build_model(found, "mean")
    assert isinstance(model, PCSR) == (kind == "carn-phase1")


def test_the_mean_of_one_network_is_that_network(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", 1, "carn-phase0")
    found = average([path, path, path])["model"]["sd"]
    assert all(torch.equal(found[key], value) for key, value in state_of(path).items())


def test_averages_over_iterations_are_taken(tmp_path: Path) -> None:
    ema = {key: value + 1 for key, value in state_of(write(tmp_path / "c.pth", 3)).items()}
    ema = {key: value for key, value in ema.items() if not key.startswith("norm.")}
    paths = [write(tmp_path / "a.pth", 1, ema={"sd": ema}), write(tmp_path / "b.pth", 2)]
    found, other = average(paths)["model"]["sd"], state_of(paths[1])
    assert ema
    for key, value in ema.items():
        torch.testing.assert_close(found[key], (value + other[key]) / 2)


def test_what_has_no_mean_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", 1)
    with pytest.raises(UserError, match="holds `carn`"):
        average([path, write(tmp_path / "b.pth", 1, "carn")])
    with pytest.raises(UserError, match="of another model: missing: light_sampler"):
        average(
            [write(tmp_path / f"{kind}.pth", 1, kind) for kind in ("carn-phase1", "carn-phase0")]
        )
    with pytest.raises(UserError, match="does not exist"):
        average([path, tmp_path / "none.pth"])
    other = load_checkpoint(path)
    other["model"]["sd"]["norm.mean"] = other["model"]["sd"]["norm.mean"] + 0.25
    save_checkpoint(tmp_path / "norm.pth", other)
    with pytest.raises(UserError, match=r"norm\.pth has another `data_norm`"):
        average([path, tmp_path / "norm.pth"])
    other = load_checkpoint(path)
    next(v for v in other["model"]["sd"].values() if v.ndim == 4)[0] = torch.nan
    save_checkpoint(tmp_path / "nan.pth", other)
    with pytest.raises(UserError, match="NaN or infinity"):
        average([path, tmp_path / "nan.pth"])


def test_the_command(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.pth", seed) for seed in (1, 2)]
    out = tmp_path / "new folder" / "mean.pth"

    def command(*words: object) -> "subprocess.CompletedProcess[str]":
        call = [sys.executable, "-m", "utils.average", *map(str, words)]
        return subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True)

    done = command(*paths, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: the mean of 2 x fsrcnn\n"
    expected = average(paths)["model"]["sd"]
    assert all(torch.equal(value, expected[key]) for key, value in state_of(out).items())
    for words, said in (
        ((*paths, "--out", paths[0]), "exists: name a new file"),
        ((paths[0], "--out", tmp_path / "c.pth"), "two checkpoints or more"),
        ((*paths, tmp_path, "--out", tmp_path / "c.pth"), "is a folder"),
    ):
        done = command(*words)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "c.pth").exists()
