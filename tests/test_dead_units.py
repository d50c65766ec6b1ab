"""Units that are silent for good: found, told, and made new without a change of the output."""

import functools
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from engine import dead_units as command
from engine.dead_units import Probe, told
from engine.soap import Soap
from models.dead_units import dead_units, relu_layers, revive
from models.pcsr import PCSR
from tests.test_models import original, pcsr
from tests.training import (
    SOAP,
    checkpoint_of,
    differences,
    make_config,
    model_spec,
    raw_config,
    run,
    stop_at,
    with_dead_units,
)
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.cli import run as run_command
from utils.config import dump_yaml
from utils.errors import UserError

# Layers, and units in all, of the small networks of tests/test_models.py.
ORIGINALS = {"fsrcnn": (0, 0), "carn": (9, 72), "srresnet": (2, 16), "rcan": (4, 20)}
KILL = -1e3


def layer_names(network: nn.Module) -> list[str]:
    return list(relu_layers(network))


def runner(network: nn.Module) -> Callable[[], None]:
    """Runs a network on a batch of pictures, a PCSR with all its upsamplers."""
    lr = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batches = [{"lr": lr, "hr": torch.empty(2, 3, 32, 32)}]
    return Probe(network, batches)._run


def kill(network: nn.Module, name: str, units: list[int]) -> None:
    layer = relu_layers(network)[name]
    assert layer.producer.bias is not None
    with torch.no_grad():
        layer.producer.bias[units] = KILL


def outputs(network: nn.Module) -> list[Tensor]:
    lr = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if not isinstance(network, PCSR):
            return [network(lr)]
        if network.classifier is None:
            return [network(lr, (32, 32))]
        sr, logits = network.outputs(lr, (32, 32))
        return [*sr, logits]


@pytest.mark.parametrize(("name", "sizes"), ORIGINALS.items())
def test_every_relu_whose_readers_are_known_is_looked_at(name: str, sizes: tuple[int, int]) -> None:
    layers = relu_layers(original(name, 4))
    assert (len(layers), sum(len(layer.producer.weight) for layer in layers.values())) == sizes


def test_a_pcsr_is_looked_at_with_its_upsamplers_and_its_classifier() -> None:
    names = layer_names(pcsr(3))
    assert {name.split(".")[0] for name in names} == {
        *("encoder", "light_sampler", "light_sampler_1", "heavy_sampler", "classifier")
    }
    assert len(names) == 9 + 1 + 2 + 3 + 1


def test_in_training_frozen_layers_are_left_alone() -> None:
    network = pcsr(2).freeze_phase0()
    kill(network, "heavy_sampler.imnet.layers.0", [0])
    batches = [{"lr": torch.rand(2, 3, 8, 8), "hr": torch.empty(2, 3, 32, 32)}]
    assert Probe(network, batches).dead_units()["heavy_sampler.imnet.layers.0"][0]
    found = Probe(network, batches, trained_only=True).dead_units()
    assert {name.split(".")[0] for name in found} == {"light_sampler", "classifier"}


@pytest.mark.parametrize(
    ("make", "killed"),
    [
        (lambda: original("carn", 4), {"b1.b1.body.0": [0, 7], "b3.b1.body.4": [5]}),
        (lambda: original("srresnet", 3), {"recon_trunk.1.conv1": [1, 2, 3]}),
        (lambda: original("rcan", 2), {}),
        (lambda: pcsr(2), {"heavy_sampler.imnet.layers.2": [9], "classifier.imnet.layers.0": [0]}),
        (lambda: pcsr(1, "srresnet"), {"encoder.recon_trunk.0.conv1": list(range(8))}),
    ],
    ids=["carn", "srresnet", "rcan", "pcsr", "phase0"],
)
def test_dead_units_are_found_and_made_new_without_a_change_of_the_output(
    make: Callable[[], nn.Module], killed: dict[str, list[int]]
) -> None:
    torch.manual_seed(3)
    network = make().eval()
    run = runner(network)
    already = dead_units(network, run)
    if not killed:
        # In attention, whose few units see one value an image.
        killed = {next(n for n in already if "conv_du" in n): [0]}
    for name, units in killed.items():
        kill(network, name, units)
        already[name][units] = True
    found = dead_units(network, run)
    assert found.keys() == already.keys()
    assert all(torch.equal(found[name], units) for name, units in already.items())

    before = outputs(network)
    new = revive(network, lambda: dead_units(network, run), seed=5)
    assert all(torch.equal(new[name], units) for name, units in found.items())
    for ours, theirs in zip(outputs(network), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not any(units.any() for units in dead_units(network, run).values())


@pytest.mark.parametrize("name", ["b2.b1.body.0", "b2.b1.body.2", "b2.b1.body.4"])
def test_a_new_unit_learns(name: str) -> None:
    """At first what reads it, and with that itself."""
    torch.manual_seed(0)
    network = original("carn", 4)
    kill(network, name, [3])
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    producer = relu_layers(network)[name].producer
    run = runner(network.eval())

    def norms() -> tuple[float, float]:
        network.train().zero_grad()
        network(torch.rand(2, 3, 8, 8)).square().mean().backward()
        assert producer.weight.grad is not None
        readers = [
            reader.weight.grad[:, (first + 3) % reader.weight.shape[1]]
            for reader, first in relu_layers(network)[name].readers
            if reader.weight.grad is not None
        ]
        return float(producer.weight.grad[3].norm()), min(float(g.norm()) for g in readers)

    assert norms()[0] == 0
    revive(network, lambda: dead_units(network, run))
    own, read = norms()
    assert own == 0 and read > 0
    optimizer.step()
    assert norms()[0] > 0


def test_new_weights_have_the_length_of_those_that_live_and_one_seed_gives_one_outcome() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        network = original("srresnet", 4).eval()
        kill(network, "recon_trunk.0.conv1", [0, 6])
        run = runner(network)
        revive(network, functools.partial(dead_units, network, run), seed=seed)
        weight = relu_layers(network)["recon_trunk.0.conv1"].producer.weight.detach()
        norms = weight.flatten(1).norm(dim=1)
        living = norms[[1, 2, 3, 4, 5, 7]].median()
        torch.testing.assert_close(norms[[0, 6]], living.expand(2))
        states.append(weight)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_nan_is_not_silence() -> None:
    network = original("srresnet", 4).eval()
    kill(network, "recon_trunk.0.conv1", [0])
    lr = torch.rand(1, 3, 4, 4)
    lr[0, 0, 1, 1] = torch.nan
    found = dead_units(network, lambda: network(lr))
    assert not any(units.any() for units in found.values())


# In training


@pytest.fixture(autouse=True)
def few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.trainer.PATCHES", 16)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_revives_resumes_to_the_bit(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    run(make_config("carn", pictures, iter_max=1), tmp_path / "before")
    dead = tmp_path / "dead.pth"
    with_dead_units(tmp_path / "before" / "iter_last.pth", dead)
    config = make_config("carn", pictures, iter_max=5, revive=[0, 3], optimizer=SOAP, ema=ema)
    assert run(config, tmp_path / "straight", init=str(dead)) == 0
    # The signal comes in iteration 2, so that the units of 3 are looked for after the resumption.
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        assert run(config, tmp_path / "resumed", init=str(dead)) == 143
    assert run(config, tmp_path / "resumed") == 0
    straight, resumed = (checkpoint_of(tmp_path / name) for name in ("straight", "resumed"))
    assert not differences(straight, resumed)
    never = make_config("carn", pictures, iter_max=5, optimizer=SOAP, ema=ema)
    assert run(never, tmp_path / "never", init=str(dead)) == 0
    bias = "b1.b1.body.0.bias"
    assert (checkpoint_of(tmp_path / "never")["model"]["sd"][bias][:2] < -900).all()
    assert (straight["model"]["sd"][bias][:2].abs() < 1).all()
    if ema is not None:
        assert (straight["ema"]["sd"][bias][:2].abs() < 1).all(), "of units of old, no average"


def test_what_is_dead_is_told(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fresh_logging: None
) -> None:
    caplog.set_level(logging.INFO)
    run(make_config("carn", pictures, iter_max=1), tmp_path / "before")
    dead = tmp_path / "dead.pth"
    with_dead_units(tmp_path / "before" / "iter_last.pth", dead, "b3.b1.body.2")
    caplog.clear()
    run(make_config("carn", pictures, iter_max=2), tmp_path / "left", init=str(dead))
    (hint,) = [line for line in caplog.messages if "`revive`" in line]
    assert "b3.b1.body.2 2" in hint and "of 576" in hint
    caplog.clear()
    config = make_config("carn", pictures, iter_max=2, revive=[1])
    run(config, tmp_path / "revived", init=str(dead))
    (line,) = [line for line in caplog.messages if "start anew" in line]
    assert line.startswith("iteration 1: ") and "b3.b1.body.2 2" in line


def test_batch_norm_and_mode_stay_as_they_were() -> None:
    network = original("carn", 4).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    Probe(network, [{"lr": torch.rand(4, 3, 8, 8), "hr": torch.empty(4, 3, 32, 32)}]).dead_units()
    assert network.training and network.get_submodule("b1.c1.1").training
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_iterations_that_cannot_be_are_refused(pictures: Path) -> None:
    for value in ([-1], [1.5], 3, ["a"]):
        with pytest.raises(UserError, match="`revive` must be"):
            make_config("carn", pictures, revive=value)


def test_words_name_the_three_worst_layers() -> None:
    flags = torch.tensor([True, False, True, True])
    found = {"a": ~flags, "b": flags, "c": flags & False, "d": flags | True, "e": flags}
    assert told(found) == "11 of 20 (d 4, b 3, e 3, 1 more layers)"
    assert told({"c": flags & False}) == "0 of 4"


# The command


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
        run_command(command.main)
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
    assert total == f"carn from {weights}: {count} of 576 ReLU units are dead on 32 patches"
    new = tmp_path / "new" / "revived.pth"
    words += ["--patches", "8"]
    assert call(monkeypatch, *words, "--output", new) == 0
    words[3] = new
    assert call(monkeypatch, *words) == 0
    assert "0 of 576 ReLU units are dead" in capsys.readouterr().out
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
        (["--output", "{weights}"], "would be lost"),
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


# The optimiser that weights are trained on with afterwards


def test_soap_begins_with_covariances_that_float32_cannot_diagonalise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third of a layer without gradient, as dead units leave it: LAPACK has failed on such."""
    asked = []
    eigh = torch.linalg.eigh

    def note(matrix: Tensor) -> object:
        asked.append(matrix.dtype)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", note)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    weight.grad = torch.randn_like(weight) * 1e-5
    weight.grad[:2] = 0
    Soap([weight], lr=1e-3).step()
    assert asked and set(asked) == {torch.float64}
