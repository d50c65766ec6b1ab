"""Training: reproducible, interruptible at any moment, and plain about what is wrong."""

import copy
import logging
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from engine.gradients import BatchGradients
from engine.objectives import make_objective
from engine.trainer import Trainer
from tests.training import (
    KINDS,
    ONE,
    checkpoint_of,
    differences,
    make_config,
    make_pictures,
    metrics_of,
    model_spec,
    raw_config,
    run,
)
from utils.checkpoint import LAST_NAME, save_checkpoint
from utils.config import check_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def fresh_logging() -> Any:
    """As the scripts have it; and without the log files that runs add."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(level)
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def phase0(pictures: Path, tmp_path: Path) -> Any:
    """Trains phase 0 of a kind where its phase 1 looks for it."""

    def prepare(kind: str) -> Path:
        folder = tmp_path / kind.replace("phase1", "phase0")
        if kind.endswith("phase1") and not folder.exists():
            run(make_config(folder.name, pictures, iter_max=1), folder)
        return folder

    return prepare


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send the process a signal in the middle of an iteration."""
    iterate = Trainer._iterate

    def iterate_and_signal(self: Trainer, current: int, batch: Any) -> Any:
        if current == step:
            signal.raise_signal(number)
        return iterate(self, current, batch)

    monkeypatch.setattr(Trainer, "_iterate", iterate_and_signal)


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


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_equals_straight_through(
    kind: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase0: Any
) -> None:
    phase0(kind)
    config = make_config(kind, pictures, iter_max=4)
    assert run(config, tmp_path / "straight") == 0
    number = signal.SIGTERM if "phase" in kind else signal.SIGINT
    with monkeypatch.context() as patch:
        stop_at(patch, 1, number)
        assert run(config, tmp_path / "resumed") == 128 + number
    assert checkpoint_of(tmp_path / "resumed")["iter"] == 2
    assert run(config, tmp_path / "resumed") == 0
    straight, resumed = (checkpoint_of(tmp_path / name) for name in ("straight", "resumed"))
    assert not differences(straight, resumed)
    rows = metrics_of(tmp_path / "resumed")
    assert [row["iteration"] for row in rows] == [2, 4]


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


def test_bf16_and_channels_last_train(pictures: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        config = make_config(
            "carn", pictures, iter_max=2, precision="bf16", channels_last=True, microbatches=count
        )
        assert run(config, tmp_path / str(count)) == 0


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


def test_phase1_refuses_another_models_phase0(pictures: Path, tmp_path: Path, phase0: Any) -> None:
    config = make_config("carn-phase1", pictures)
    with pytest.raises(
        UserError,
        match=r"of another model: its `encoder_spec.name` is fsrcnn, the config's is carn",
    ):
        run(config, tmp_path / "x", init=str(phase0("fsrcnn-phase1") / LAST_NAME))


# Where a run continues


def test_a_finished_run_is_left_alone_and_can_be_extended(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2), tmp_path)
    before = (tmp_path / LAST_NAME).read_bytes()
    assert run(make_config("fsrcnn", pictures, iter_max=2), tmp_path) == 0
    assert (tmp_path / LAST_NAME).read_bytes() == before
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 3


def test_resume_never_keeps_what_was_there(pictures: Path, tmp_path: Path) -> None:
    config = make_config("fsrcnn", pictures, iter_max=2)
    run(config, tmp_path)
    (tmp_path / "release.pth").write_bytes(b"released")
    before = (tmp_path / LAST_NAME).read_bytes()
    rows = metrics_of(tmp_path)
    run(make_config("fsrcnn", pictures, iter_max=1, seed=5), tmp_path, resume="never")
    assert checkpoint_of(tmp_path)["iter"] == 1
    (kept,) = tmp_path.glob("before-*")
    assert (kept / LAST_NAME).read_bytes() == before
    assert metrics_of(kept) == rows
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [1]
    assert (tmp_path / "release.pth").read_bytes() == b"released"


def test_resume_from_a_path(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2), tmp_path / "a")
    config = make_config("fsrcnn", pictures, iter_max=3)
    run(config, tmp_path / "b", resume=str(tmp_path / "a" / LAST_NAME))
    run(config, tmp_path / "a")
    assert not differences(checkpoint_of(tmp_path / "a"), checkpoint_of(tmp_path / "b"))


def test_the_configs_rate_counts_after_resuming(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("fsrcnn", pictures, iter_max=1)
    run(config, tmp_path)
    optimizer = copy.deepcopy(config.optimizer)
    assert optimizer is not None
    optimizer["args"]["lr"] = 5e-3
    with caplog.at_level(logging.INFO):
        run(make_config("fsrcnn", pictures, iter_max=2, optimizer=optimizer), tmp_path)
    assert metrics_of(tmp_path)[-1]["lr"] == pytest.approx(5e-3, rel=0.01)
    assert "`optimizer` was" in caplog.text and "resumed at iteration 1" in caplog.text


def test_metrics_of_lost_iterations_go(pictures: Path, tmp_path: Path) -> None:
    config = make_config("fsrcnn", pictures, iter_max=2, iter_print=1)
    run(config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"iteration": 3, "kind": "train"}\n{"iteration": 3, "ki')
    run(make_config("fsrcnn", pictures, iter_max=4, iter_print=1), tmp_path)
    assert [row["iteration"] for row in metrics_of(tmp_path)] == [1, 2, 3, 4]


def test_leftovers_of_a_killed_run_go(pictures: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".iter_last.1-a.tmp.pth"
    leftover.write_bytes(b"half")
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path)
    assert not leftover.exists()


def test_checkpoints_that_do_not_fit_are_named(pictures: Path, tmp_path: Path) -> None:
    config = make_config("fsrcnn", pictures, iter_max=2)
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path)
    good = checkpoint_of(tmp_path)
    path = tmp_path / LAST_NAME
    state = good["optimizer"]["sd"]
    cases = [
        ({"model": good["model"], "iter": 1}, "holds weights only"),
        ({**good, "optimizer": {}}, "holds weights only"),
        ({**good, "optimizer": {"sd": {"state": {}, "param_groups": []}}}, "holds 0 tensors"),
        ({**good, "optimizer": {"sd": {"state": 3, "param_groups": state["param_groups"]}}}, "fit"),
        ({**good, "model": {**good["model"], "name": "carn"}}, "holds `carn`"),
    ]
    for content, message in cases:
        save_checkpoint(path, content)
        with pytest.raises(UserError, match=message):
            run(config, tmp_path)
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        run(config, tmp_path)


# When it saves, when it stops


def test_checkpoint_by_the_clock(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iterate

    def crash_at_3(self: Trainer, step: int, batch: Any) -> Any:
        if step == 3:
            raise RuntimeError("crash")
        return iterate(self, step, batch)

    monkeypatch.setattr(Trainer, "_iterate", crash_at_3)
    for limit in (0, 3600):
        config = make_config("fsrcnn", pictures, iter_save_s=limit)
        with pytest.raises(RuntimeError, match="crash"):
            run(config, tmp_path / str(limit))
    assert checkpoint_of(tmp_path / "0")["iter"] == 3
    assert not (tmp_path / "3600" / "iter_last.pth").exists()


def test_failed_start_leaves_no_untrained_checkpoint(pictures: Path, tmp_path: Path) -> None:
    """It would stand in for released weights."""
    raw = raw_config("fsrcnn", pictures)
    raw["train_dataset"]["wrapper"]["args"]["inp_size"] = 5000
    with pytest.raises(UserError, match="too small"):
        run(check_config(raw, "run"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.pth"))


def test_a_signal_before_the_first_iteration_leaves_no_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_batch = Trainer._next_batch

    def signal_first(self: Trainer, number: int) -> Any:
        return next_batch(self, number or signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_next_batch", signal_first)
    assert run(make_config("fsrcnn", pictures, iter_save_s=0), tmp_path) == 143
    assert not (tmp_path / LAST_NAME).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_keeps_the_last_good_checkpoint(
    value: float, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iterate

    def diverge(self: Trainer, step: int, batch: Any) -> Any:
        losses = iterate(self, step, batch)
        return {"loss": losses["loss"] * value} if step == 2 else losses

    monkeypatch.setattr(Trainer, "_iterate", diverge)
    message = r"training diverged: loss is not finite at iteration 3 \(seed 0\); the last good"
    with pytest.raises(UserError, match=message):
        run(make_config("fsrcnn", pictures, iter_save=1), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 2


def test_weights_that_are_not_finite_are_never_saved(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Trainer._iterate

    def spoil(self: Trainer, step: int, batch: Any) -> Any:
        losses = iterate(self, step, batch)
        if step == 1:
            self.model.get_parameter("tail_conv.bias").data[0] = float("nan")
        return losses

    monkeypatch.setattr(Trainer, "_iterate", spoil)
    with pytest.raises(UserError, match=r"diverged: tail_conv.bias is not finite at iteration 2"):
        run(make_config("fsrcnn", pictures, iter_save=1), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 1


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
    assert names == {"iter_last", "config", "log", "metrics", "events"}
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


# What is refused


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


def test_whole_images_of_different_sizes_need_inp_size(tmp_path: Path) -> None:
    folder = make_pictures(make_pictures(tmp_path / "p", count=5).parent / "p", 1, side=32)
    raw = raw_config("fsrcnn", folder)
    del raw["train_dataset"]["wrapper"]["args"]["inp_size"]
    with pytest.raises(UserError, match=r"`train_dataset.wrapper.args.inp_size` is missing"):
        run(check_config(raw, "x"), tmp_path / "run")


def test_nothing_is_moved_before_a_new_run_can_start(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path)
    raw = changed(raw_config("fsrcnn", pictures), "train_dataset.dataset.args.root_path", "/no")
    with pytest.raises(UserError):
        run(check_config(raw, "x"), tmp_path, resume="never")
    assert (tmp_path / LAST_NAME).exists() and not list(tmp_path.glob("before-*"))


def test_loop_draws_nothing_from_the_global_generator(pictures: Path, tmp_path: Path) -> None:
    """Else validation or workers would change a resumed run."""
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path / "a")
    state = checkpoint_of(tmp_path / "a")["rng"]
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path / "a")
    assert torch.equal(checkpoint_of(tmp_path / "a")["rng"], state)
