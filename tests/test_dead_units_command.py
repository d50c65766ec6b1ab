"""``python -m engine.dead_units``: what it counts, writes and refuses."""

from pathlib import Path

import pytest
import torch

import models
from engine import dead_units as command
from tests.training import model_spec, raw_config, with_dead_units
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.cli import run
from utils.config import dump_yaml


@pytest.fixture
def files(pictures: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A config, and weights of its model with two dead units."""
    config = tmp_path / "carn.yaml"
    config.write_text(dump_yaml(raw_config("carn", pictures)), encoding="utf-8")
    torch.manual_seed(0)
    spec = model_spec("carn")
    model = {**spec, "sd": models.make(spec).state_dict()}
    save_checkpoint(tmp_path / "whole.pth", {"model": model, "iter": 7})
    with_dead_units(tmp_path / "whole.pth", tmp_path / "dead.pth")
    return config, tmp_path / "dead.pth"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["dead_units", "--device", "cpu", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run(command.main)
    return int(end.value.code or 0)


def test_command_counts_and_writes_weights_that_make_the_same_pictures(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, weights = files
    words = ["--config", config, "--weights", weights]
    assert call(monkeypatch, *words, "--patches", "30") == 0
    *layers, total = capsys.readouterr().out.splitlines()
    assert layers[0].split() == ["b1.b1.body.0", "2", "of", "64"]
    count = sum(int(line.split()[1]) for line in layers)
    assert total == f"carn from {weights}: {count} of 576 hidden ReLU units are dead on 32 patches"
    new = tmp_path / "new" / "revived.pth"
    words += ["--patches", "8"]
    assert call(monkeypatch, *words, "--output", new) == 0
    words[3] = new
    assert call(monkeypatch, *words, "--output", tmp_path / "again.pth") == 0
    assert "0 of 576 hidden ReLU units are dead" in capsys.readouterr().out
    assert not (tmp_path / "again.pth").exists(), "nothing was dead any more"
    networks = []
    for path in (weights, new):
        checkpoint = load_checkpoint(path)
        network = models.make(checkpoint["model"]).eval()
        load_weights(network, checkpoint["model"]["sd"], path)
        networks.append(network)
    lr = torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        assert abs(networks[0](lr) - networks[1](lr)).max() < 0.01
    assert checkpoint["iter"] == 0 and checkpoint["model"]["name"] == "carn"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "revived.yaml"], "a name that ends in .pth"),
        (["--output", "{weights}"], "exists: name a new file"),
        (["--set", "train_dataset.wrapper.args.scale=[3,3]"], "scale"),
        (["--patches", "0"], "--patches"),
        (["--set", "train_dataset=null"], "`train_dataset` is missing"),
    ],
)
def test_command_refuses(
    words: list[str],
    message: str,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, weights = files
    words = [word.format(weights=weights) for word in words]
    assert call(monkeypatch, "--config", config, "--weights", weights, *words) == 2
    assert message in capsys.readouterr().err
