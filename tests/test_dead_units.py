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
from engine.ema import Ema
from engine.soap import Soap
from engine.unit_probe import Probe, told
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
    return Probe(network, batches).run


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
        readers = []
        for reader, first in relu_layers(network)[name].readers:
            assert isinstance(reader, nn.Conv2d) and reader.weight.grad is not None
            inputs = reader.weight.shape[1]
            group, index = divmod(first + 3, inputs)
            outputs = len(reader.weight) // (reader.in_channels // inputs)
            readers.append(reader.weight.grad[group * outputs : (group + 1) * outputs, index])
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


def outputs_of(module: nn.Module, call: Callable[[], object]) -> list[Tensor]:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda *found: outputs.append(found[2].clone()))
    call()
    handle.remove()
    return outputs


def test_the_mode_decides_what_batch_norm_does() -> None:
    """In its first iterations a network's running statistics are not yet those of its batches."""
    torch.manual_seed(0)
    network = original("carn", 4).train()
    lr = torch.rand(8, 3, 16, 16)
    probe = Probe(network, [{"lr": lr, "hr": torch.empty(8, 3, 64, 64)}])
    for name, units in probe.dead_units().items():
        layer = relu_layers(network)[name]
        with torch.no_grad():
            outputs = outputs_of(layer.observed, lambda: network(lr))
        highest = torch.stack([output.amax((0, 2, 3)) for output in outputs]).amax(0)
        assert torch.equal(units, highest <= 0), name
    before = network(lr).detach()
    kill(network, "b2.b1.body.2", [1, 2])
    killed = network(lr).detach()
    assert not torch.allclose(before, killed)
    probe.revive(0)
    torch.testing.assert_close(network(lr).detach(), killed, rtol=0, atol=1e-5)


def test_only_units_that_were_dead_are_drawn() -> None:
    torch.manual_seed(0)
    network = original("srresnet", 4).eval()
    kill(network, "recon_trunk.0.conv1", [2])
    run = runner(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    revive(network, functools.partial(dead_units, network, run))
    changed = {k for k, value in network.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {f"recon_trunk.0.{n}" for n in ("conv1.weight", "conv1.bias", "conv2.weight")}
    moved = (network.state_dict()["recon_trunk.0.conv1.weight"] != before[sorted(changed)[1]]).any(
        dim=(1, 2, 3)
    )
    assert moved.nonzero().flatten().tolist() == [2]


def test_of_weights_that_stay_the_average_stays() -> None:
    network = original("srresnet", 4)
    ema = Ema(network, 0.5)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1)
    kept = {key: value.clone() for key, value in ema.state_dict().items()}
    with ema.jumping():
        kill(network, "recon_trunk.0.conv1", [2])
    for key, value in ema.state_dict().items():
        jumped = (value != kept[key]).nonzero().tolist()
        assert jumped == ([[2]] if key == "recon_trunk.0.conv1.bias" else []), key
    assert ema.state_dict()["recon_trunk.0.conv1.bias"][2] == KILL


def test_no_random_number_of_the_run_is_used() -> None:
    network = pcsr(2)
    kill(network, "light_sampler.imnet.layers.0", [0])
    before = torch.get_rng_state()
    batches = [{"lr": torch.zeros(2, 3, 8, 8), "hr": torch.empty(2, 3, 32, 32)}]
    Probe(network, batches).revive(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_whole_images_are_read_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.unit_probe._MOST_PIXELS", 200)
    batch = {"lr": torch.rand(1, 3, 8, 16), "hr": torch.empty(1, 3, 32, 64)}
    assert Probe(original("srresnet", 4), [batch] * 5).patches == 2
    assert Probe(original("fsrcnn", 4), [batch] * 5).patches == 0, "there is nothing to look at"


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
    assert "b3.b1.body.2 2" in hint and "of 576 hidden ReLU units" in hint
    caplog.clear()
    config = make_config("carn", pictures, iter_max=2, revive=[1])
    run(config, tmp_path / "revived", init=str(dead))
    (line,) = [line for line in caplog.messages if "new weights" in line]
    assert line.startswith("iteration 1: ") and "b3.b1.body.2 2" in line
    caplog.clear()
    run(make_config("carn", pictures, iter_max=1, revive=[0, 1, 70]), tmp_path / "late")
    assert "`revive`: 1, 70 not reached" in caplog.messages


def test_phase_1_makes_new_what_it_trains(pictures: Path, tmp_path: Path) -> None:
    run(make_config("carn-phase0", pictures, iter_max=1), tmp_path / "phase0")
    dead = tmp_path / "dead.pth"
    source = tmp_path / "phase0" / "iter_last.pth"
    with_dead_units(source, dead, "heavy_sampler.imnet.layers.2")
    run(
        make_config("carn-phase1", pictures, iter_max=1, revive=[0]), tmp_path / "1", init=str(dead)
    )
    state = checkpoint_of(tmp_path / "1")["model"]["sd"]
    kept = load_checkpoint(dead)["model"]["sd"]
    assert all(torch.equal(state[k], kept[k]) for k in kept if not k.endswith("tracked"))


def test_a_run_that_has_ended_does_not_fail_for_a_hint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> object:
        raise UserError("the samples are gone")

    monkeypatch.setattr("engine.data.TrainBatches.of", gone)
    assert run(make_config("carn", pictures, iter_max=1), tmp_path / "run") == 0
    with pytest.raises(UserError, match="gone"):
        run(make_config("carn", pictures, iter_max=1, revive=[0]), tmp_path / "other")


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
    assert told(found) == "11 of 20 hidden ReLU units: d 4, b 3, e 3, 1 elsewhere"
    assert told({"c": flags & False}) == "0 of 4 hidden ReLU units"


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


# The optimiser that weights are trained on with afterwards


def test_soap_finds_its_first_eigenvectors_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two thirds of a layer had no gradient, LAPACK's did not converge in float32."""
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
