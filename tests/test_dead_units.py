"""Units that are silent for good: found, told, and made new without a change of the output."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine.ema import Ema
from engine.unit_probe import Probe, told
from models.dead_units import dead_units, relu_layers, revive
from models.pcsr import PCSR
from tests.test_models import original, pcsr

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


def test_batch_norm_and_mode_stay_as_they_were() -> None:
    network = original("carn", 4).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    Probe(network, [{"lr": torch.rand(4, 3, 8, 8), "hr": torch.empty(4, 3, 32, 32)}]).dead_units()
    assert network.training and network.get_submodule("b1.c1.1").training
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_words_name_the_three_worst_layers() -> None:
    flags = torch.tensor([True, False, True, True])
    found = {"a": ~flags, "b": flags, "c": flags & False, "d": flags | True, "e": flags}
    assert told(found) == "11 of 20 hidden ReLU units: d 4, b 3, e 3, 1 elsewhere"
    assert told({"c": flags & False}) == "0 of 4 hidden ReLU units"
