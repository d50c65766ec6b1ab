"""Training: the same weights each time, what each phase trains, and the files of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.gradients import BatchGradients
from engine.objectives import make_objective
from tests.training import (
    ONE,
    checkpoint_of,
    differences,
    make_config,
    metrics_of,
    model_spec,
    raw_config,
    run,
)
from utils.checkpoint import LAST_NAME
from utils.config import check_config
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("fresh_logging")


# Reproducible


def test_same_seed_same_weights_whatever_the_threads(pictures: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = make_config("carn", pictures, iter_max=3)
    try:
        for name, count in (("one", 1), ("two", 2)):
            torch.set_num_threads(count)
            assert run(config, tmp_path / name) == 0
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert not differences(checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two"))


def test_another_seed_gives_other_weights_and_0_is_a_seed(pictures: Path, tmp_path: Path) -> None:
    for seed in (0, 1, None):
        run(make_config("fsrcnn", pictures, iter_max=1, seed=seed), tmp_path / str(seed))
    checkpoints = [checkpoint_of(tmp_path / str(seed)) for seed in (0, 1, None)]
    assert checkpoints[0]["seed"] == 0
    weights = [c["model"]["sd"]["tail_conv.weight"] for c in checkpoints]
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    again = make_config("fsrcnn", pictures, iter_max=1, seed=checkpoints[2]["seed"])
    run(again, tmp_path / "again")
    assert not differences(checkpoints[2]["model"], checkpoint_of(tmp_path / "again")["model"])


@pytest.mark.parametrize("kind", ["carn", "fsrcnn-phase1", "carn-phase0"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: str) -> None:
    """In float64, where only a mistake differs; batch statistics and loads included."""
    outcomes = []
    for count in (1, 2, 4):
        torch.manual_seed(0)
        model = models.make(model_spec(kind)).double().train()
        lr, hr = torch.rand(4, 3, 6, 6).double(), torch.rand(4, 3, 24, 24).double()
        trained = [p for p in model.parameters() if p.requires_grad]
        objective = make_objective(model, loss_rgb_w=1000, loss_avg_w=3)
        with BatchGradients(
            objective, trained, world=ONE, batch_size=4, microbatches=count
        ) as gradients:
            losses = gradients(lr, hr)
        running = [value for key, value in model.state_dict().items() if "running" in key]
        outcomes.append([losses["loss"], *running, *(p.grad for p in trained)])
    for values in outcomes[1:]:
        for value, whole in zip(values, outcomes[0], strict=True):
            torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize(("batch_size", "threads"), [(3, 2), (4, 1)])
def test_a_batch_that_goes_into_no_parts_has_all_threads(
    batch_size: int, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = models.make(model_spec("fsrcnn"))
        objective = make_objective(model, loss_rgb_w=1, loss_avg_w=1)
        parameters = list(model.parameters())
        with BatchGradients(
            objective, parameters, world=ONE, batch_size=batch_size, microbatches=2
        ) as gradients:
            assert torch.get_num_threads() == threads
            gradients(torch.rand(batch_size, 3, 6, 6), torch.rand(batch_size, 3, 24, 24))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    told = "`microbatches: 2` does not go into parts of 3 samples: there are 1" in caplog.text
    assert told is (batch_size == 3)


def test_bf16_and_channels_last_train(pictures: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        config = make_config(
            "carn", pictures, iter_max=2, precision="bf16", channels_last=True, microbatches=count
        )
        assert run(config, tmp_path / str(count)) == 0


def test_loop_draws_nothing_from_the_global_generator(pictures: Path, tmp_path: Path) -> None:
    """Else validation or workers would change a resumed run."""
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path / "a")
    state = checkpoint_of(tmp_path / "a")["rng"]
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path / "a")
    assert torch.equal(checkpoint_of(tmp_path / "a")["rng"], state)


# Phase 1


@pytest.mark.parametrize("kind", ["fsrcnn-phase1", "carn-phase1"])
def test_phase1_leaves_backbone_and_heavy_upsampler_alone(
    kind: str, pictures: Path, tmp_path: Path, phase0: Any
) -> None:
    before = checkpoint_of(phase0(kind))["model"]["sd"]
    run(make_config(kind, pictures, iter_max=2), tmp_path / kind)
    after = checkpoint_of(tmp_path / kind)["model"]["sd"]
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.split(".")[0] for key in after.keys() - before.keys()} == {
        "light_sampler",
        "classifier",
    }


def test_phase1_starts_where_init_says(pictures: Path, tmp_path: Path, phase0: Any) -> None:
    weights = phase0("fsrcnn-phase1") / LAST_NAME
    elsewhere = weights.rename(tmp_path / "elsewhere.pth")
    config = make_config("fsrcnn-phase1", pictures, iter_max=1)
    with pytest.raises(UserError, match=r"phase 1 starts from phase 0's weights, and .*--init"):
        run(config, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    run(config, tmp_path / "a", init=str(elsewhere))
    by_config = make_config("fsrcnn-phase1", pictures, iter_max=1, init=str(elsewhere))
    run(by_config, tmp_path / "b")
    assert not differences(*(checkpoint_of(tmp_path / name)["model"]["sd"] for name in "ab"))
    with pytest.raises(UserError, match=r"gone.pth does not exist"):
        run(config, tmp_path / "c", init=str(tmp_path / "gone.pth"))
    unnamed = check_config(raw_config("fsrcnn-phase1", pictures), "my-model")
    with pytest.raises(UserError, match="name them with --init"):
        run(unnamed, tmp_path / "c")


@pytest.mark.parametrize("kind", ["carn", "carn-phase0"])
def test_every_training_starts_where_init_says(kind: str, pictures: Path, tmp_path: Path) -> None:
    run(make_config(kind, pictures, iter_max=2), tmp_path / "first")
    still = {"name": "adam", "args": {"lr": 1e-12}}
    config = make_config(kind, pictures, iter_max=1, seed=1, optimizer=still)
    run(config, tmp_path / "second", init=str(tmp_path / "first" / LAST_NAME))
    before, after = (checkpoint_of(tmp_path / name) for name in ("first", "second"))
    assert (before["iter"], after["iter"]) == (2, 1)
    for name, value in before["model"]["sd"].items():
        # Those of batch norm move, whatever the rate.
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(after["model"]["sd"][name], value, rtol=0, atol=1e-9)


def test_phase0_starts_from_a_phase1(pictures: Path, tmp_path: Path, phase0: Any) -> None:
    before = checkpoint_of(phase0("carn-phase1"))["model"]["sd"]
    run(make_config("carn-phase1", pictures, iter_max=1), tmp_path / "carn-phase1")
    still = {"name": "adam", "args": {"lr": 1e-12}}
    config = make_config("carn-phase0", pictures, iter_max=1, optimizer=still)
    run(config, tmp_path / "again", init=str(tmp_path / "carn-phase1" / LAST_NAME))
    after = checkpoint_of(tmp_path / "again")["model"]["sd"]
    assert after.keys() == before.keys()
    name = "heavy_sampler.imnet.layers.0.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)


def test_originals_refuse_other_models_weights(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path / "first")
    with pytest.raises(UserError, match="holds `fsrcnn`, the config asks for `carn`"):
        weights = str(tmp_path / "first" / LAST_NAME)
        run(make_config("carn", pictures), tmp_path / "second", init=weights)
    assert not (tmp_path / "second").exists()


def test_phase1_refuses_another_models_phase0(pictures: Path, tmp_path: Path, phase0: Any) -> None:
    config = make_config("carn-phase1", pictures)
    with pytest.raises(
        UserError,
        match=r"of another model: its `encoder_spec.name` is fsrcnn, the config's is carn",
    ):
        run(config, tmp_path / "x", init=str(phase0("fsrcnn-phase1") / LAST_NAME))


# What one sees


def test_a_run_leaves_its_files(pictures: Path, tmp_path: Path, phase0: Any) -> None:
    phase0("fsrcnn-phase1")
    data = raw_config("fsrcnn-phase1", pictures)["train_dataset"]
    valid = {**data, "wrapper": {"name": "sr-implicit-downsampled", "args": {"scale": 4}}}
    del valid["batch_size"]
    folder = tmp_path / "run"
    config = make_config(
        "fsrcnn-phase1",
        pictures,
        iter_val=2,
        valid_dataset={**valid, "scales": [4, 2.7]},
        psnr_type="rgb",
    )
    run(config, folder)
    names = {path.name.split(".")[0] for path in folder.iterdir()}
    assert names == {"iter_last", "best", "config", "log", "metrics", "events"}
    rows = metrics_of(folder)
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["iteration"] for row in train] == [2, 4, 6]
    assert train[0].keys() >= {"loss", "loss_rgb", "loss_avg", "lr", "images_per_s", "data_share"}
    valid_rows = [row for row in rows if row["kind"] == "valid"]
    assert {(row["scale"], row["name"]) for row in valid_rows} == {
        (scale, name) for scale in (4, 2.7) for name in ("k0", "heavy")
    }
    heavy = [row for row in valid_rows if row["name"] == "heavy"]
    assert all(row["heavy_share"] == 1 and 5 < row["psnr"] < 60 for row in heavy)
    log = (folder / "log.txt").read_text(encoding="utf-8")
    for words in ("ETA 0:00:0", "images/s", "validation x2.7 k0", "finished at iteration 6"):
        assert words in log
    assert "seed: 0" in (folder / "config.yaml").read_text(encoding="utf-8")


def test_drawn_seed_is_in_the_resolved_config(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1, seed=None), tmp_path)
    seed = checkpoint_of(tmp_path)["seed"]
    assert f"seed: {seed}" in (tmp_path / "config.yaml").read_text(encoding="utf-8")
