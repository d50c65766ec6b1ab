"""A run may end at any moment and goes on as if nothing had happened; what is there is kept."""

import copy
import logging
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints import older_path
from engine.run_folder import CONFIG_NAME
from tests.training import (
    KINDS,
    SOAP,
    checkpoint_of,
    differences,
    make_config,
    metrics_of,
    raw_config,
    run,
    stop_at,
)
from utils.checkpoint import BEST_NAME, LAST_NAME, load_checkpoint, save_checkpoint
from utils.config import Config, check_config
from utils.errors import UserError
from utils.run_metrics import METRICS_NAME

pytestmark = pytest.mark.usefixtures("fresh_logging")


def validated(pictures: Path, **changes: Any) -> Config:
    """A small run with a validation at its end."""
    data = raw_config("fsrcnn", pictures)["train_dataset"]["dataset"]
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    valid = {"dataset": data, "wrapper": wrapper}
    return make_config("fsrcnn", pictures, valid_dataset=valid, **changes)


def iterations_of(folder: Path) -> dict[str, int]:
    """The checkpoints in a folder, and after how many iterations each was written."""
    return {path.name: load_checkpoint(path)["iter"] for path in folder.glob("*.pth")}


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


def test_the_line_after_a_resume_is_that_of_an_undisturbed_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over iterations before and after it."""
    config = make_config("fsrcnn", pictures, iter_max=6, iter_print=3)
    run(config, tmp_path / "straight")
    for step in (0, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, step, signal.SIGTERM)
            assert run(config, tmp_path / "resumed") == 128 + signal.SIGTERM
    run(config, tmp_path / "resumed")
    straight, resumed = (
        [(row["iteration"], row["loss"], row["grad_norm"]) for row in metrics_of(tmp_path / name)]
        for name in ("straight", "resumed")
    )
    assert [iteration for iteration, *_ in straight] == [3, 6]
    assert straight == resumed
    # A mean is a part of the vector of all gradients, which must not come with it.
    stop_at(monkeypatch, 0, signal.SIGTERM)
    run(config, tmp_path / "stopped")
    stopped = load_checkpoint(tmp_path / "stopped" / LAST_NAME)
    assert stopped["means"]["averaged"] == 1
    assert all(v.untyped_storage().nbytes() <= 8 for v in stopped["means"]["sums"].values())


def test_init_plays_no_part_in_a_run_that_goes_on(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("fsrcnn", pictures, iter_max=2)
    run(config, tmp_path)
    longer = make_config("fsrcnn", pictures, iter_max=4, init="other.pth")
    assert run(longer, tmp_path, init="none.pth", started_again=True) == 0
    assert "none.pth" not in caplog.text
    assert "`init` was" not in caplog.text
    assert run(make_config("fsrcnn", pictures, iter_max=6), tmp_path, init="none.pth") == 0
    assert "--init none.pth plays no part: the run goes on from" in caplog.text


def test_weights_that_learned_with_another_norm_are_refused(pictures: Path, tmp_path: Path) -> None:
    """To go on with, and to begin with; equal numbers, or none, are fine."""
    norm = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    run(make_config("fsrcnn", pictures, iter_max=2, data_norm=norm), tmp_path)
    other = make_config("fsrcnn", pictures, data_norm={**norm, "std": [1.0, 2.0, 1.0]})
    message = r"`data_norm.std` \[1, 1, 1\], the config's is \[1, 2, 1\]"
    with pytest.raises(UserError, match=message):
        run(other, tmp_path)
    with pytest.raises(UserError, match=message):
        run(other, tmp_path / "new", init=str(tmp_path / LAST_NAME))
    half = load_checkpoint(tmp_path / LAST_NAME)["model"]
    half["sd"] = {k: v.half() if v.is_floating_point() else v for k, v in half["sd"].items()}
    save_checkpoint(tmp_path / "half.pth", {"model": half, "iter": 2})
    config = make_config("fsrcnn", pictures, iter_max=1, data_norm=norm)
    assert run(config, tmp_path / "half", init=str(tmp_path / "half.pth")) == 0
    for iterations, given in ((4, norm), (6, None)):
        assert (
            run(make_config("fsrcnn", pictures, iter_max=iterations, data_norm=given), tmp_path)
            == 0
        )
        mean = checkpoint_of(tmp_path)["model"]["sd"]["norm.mean"].flatten().tolist()
        assert mean == pytest.approx(norm["mean"])


def test_a_checkpoint_that_is_a_link_is_that_of_its_folder(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2), tmp_path / "run")
    last = tmp_path / "run" / LAST_NAME
    last.rename(tmp_path / "elsewhere.pth")
    last.symlink_to(tmp_path / "elsewhere.pth")
    run(make_config("fsrcnn", pictures, iter_max=4), tmp_path / "run")
    assert [row["iteration"] for row in metrics_of(tmp_path / "run")] == [2, 4]
    assert not list((tmp_path / "run").glob("before-*"))


def test_soap_resumes_as_straight_through(pictures: Path, tmp_path: Path) -> None:
    """Stopped after each number of steps between two changes of its eigenvectors."""
    config = make_config("carn", pictures, iter_max=6, optimizer=SOAP)
    run(config, tmp_path / "straight")
    for stop in (1, 2, 3):
        folder = tmp_path / str(stop)
        run(make_config("carn", pictures, iter_max=stop, optimizer=SOAP), folder)
        run(config, folder)
        assert not differences(checkpoint_of(tmp_path / "straight"), checkpoint_of(folder)), stop


def test_a_finished_run_is_left_alone_and_can_be_extended(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2), tmp_path)
    before = (tmp_path / LAST_NAME).read_bytes()
    assert run(make_config("fsrcnn", pictures, iter_max=2), tmp_path) == 0
    assert (tmp_path / LAST_NAME).read_bytes() == before
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path)
    assert checkpoint_of(tmp_path)["iter"] == 3


def test_a_run_beyond_a_shortened_end_is_left_alone(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(validated(pictures, iter_max=3), tmp_path)
    before = (tmp_path / LAST_NAME).read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b"")  # as where it was stopped before a validation
    assert run(validated(pictures, iter_max=2), tmp_path) == 0
    assert "nothing to do: finished at iteration 3" in caplog.text
    assert "`iter_max` was 3 and is now 2, which the finished run knows nothing of" in caplog.text
    assert (tmp_path / LAST_NAME).read_bytes() == before


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


def test_resume_from_a_path_keeps_the_run_that_is_there(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=2), tmp_path / "a")
    run(make_config("fsrcnn", pictures, iter_max=3), tmp_path / "b")
    there = (tmp_path / "b" / LAST_NAME).read_bytes()
    config = make_config("fsrcnn", pictures, iter_max=4)
    run(config, tmp_path / "b", resume=str(tmp_path / "a" / LAST_NAME))
    (kept,) = (tmp_path / "b").glob("before-*")
    assert (kept / LAST_NAME).read_bytes() == there
    assert [row["iteration"] for row in metrics_of(tmp_path / "b")] == [4]


@pytest.mark.parametrize("way", ["copied over the last", "--resume PATH"])
def test_gone_back_to_an_older_checkpoint_what_came_after_it_is_kept_and_plays_no_part(
    way: str, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where all that is left of the new part is damaged, or worse than the best before."""
    folder, last = tmp_path / "run", tmp_path / "run" / LAST_NAME
    config = validated(pictures, iter_max=6, iter_save=1, keep_last=4)
    run(config, folder)
    straight, rows = checkpoint_of(folder), metrics_of(folder)
    best = {**load_checkpoint(folder / BEST_NAME), "best": {"psnr": 99.0, "iteration": 6}}
    save_checkpoint(folder / BEST_NAME, best)
    older = older_path(last, 3)
    if way == "--resume PATH":
        resume, later = str(older), {LAST_NAME: 6, "iter_last.1.pth": 5, "iter_last.2.pth": 4}
    else:
        shutil.copy(older, last)
        resume, later = "auto", {"iter_last.1.pth": 5, "iter_last.2.pth": 4}
    with caplog.at_level(logging.INFO):
        run(validated(pictures, iter_max=4, iter_save=1), folder, resume=resume)
    (kept,) = folder.glob("before-*")
    assert "resumed at iteration 3" in caplog.text and str(kept) in caplog.text
    assert iterations_of(kept) == {**later, BEST_NAME: 6} and metrics_of(kept) == rows
    assert max(iterations_of(folder).values()) == 4 == iterations_of(folder)[BEST_NAME]

    last.write_bytes(b"damaged")
    run(config, folder)
    assert not differences(checkpoint_of(folder), straight)
    assert [found.name for found in folder.glob("before-*")] == [kept.name]


def test_without_the_newest_checkpoint_the_one_before_goes_on(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("fsrcnn", pictures, iter_max=4, iter_save=1)
    run(config, tmp_path)
    whole = checkpoint_of(tmp_path)
    (tmp_path / LAST_NAME).unlink()
    with caplog.at_level(logging.INFO):
        assert run(config, tmp_path) == 0
    assert "resumed at iteration 3" in caplog.text
    assert not differences(whole, checkpoint_of(tmp_path))


def test_killed_in_the_last_validation_it_is_made_up_for(pictures: Path, tmp_path: Path) -> None:
    config = validated(pictures, iter_max=2)
    run(config, tmp_path)
    whole = (tmp_path / METRICS_NAME).read_text()
    rows = [line for line in whole.splitlines() if '"valid"' not in line]
    (tmp_path / METRICS_NAME).write_text("".join(f"{row}\n" for row in rows))
    (tmp_path / BEST_NAME).unlink()
    assert run(config, tmp_path) == 0
    assert (tmp_path / METRICS_NAME).read_text() == whole
    assert (tmp_path / BEST_NAME).is_file()


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
    assert "`optimizer.args.lr` was" in caplog.text and "resumed at iteration 1" in caplog.text


def test_what_has_changed_in_the_config_is_told(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1, warmup=3, nan_skip=0), tmp_path / "a")
    # Without `warmup`, and without what was as it is by default.
    raw = raw_config("fsrcnn", pictures, iter_max=2, ema=0.5, lr_scheduler=None)
    raw["train_dataset"]["batch_size"] = 2
    raw["optimizer"]["args"] |= {"lr": 5e-3, "weight_decay": 0.1}
    with caplog.at_level(logging.INFO):
        run(check_config(raw, "fsrcnn"), tmp_path / "a")
    told = [line for line in caplog.messages if " is now " in line]
    assert told == [
        f"`{change}, as the config says"
        for change in (
            "optimizer.args.lr` was 0.001 and is now 0.005",
            "optimizer.args.weight_decay` was None and is now 0.1",
            "lr_scheduler.args.T_period` was [100] and is now [2]",
            "train_dataset.batch_size` was 4 and is now 2",
            "iter_max` was 1 and is now 2",
            "ema` was None and is now 0.5",
            "warmup` was 3 and is now 0",
        )
    ]


@pytest.mark.parametrize("case", ["the same", "damaged", "of another folder"])
def test_nothing_is_told_of_what_is_the_same_or_not_known(
    case: str, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path / "a")
    saved = tmp_path / "a" / CONFIG_NAME
    resume, keys = "auto", {"batch_size": 2}
    if case == "the same":
        saved.write_text(saved.read_text().replace("iter_max: 1", "iter_max: 2"))
        keys = {}
    elif case == "damaged":
        saved.write_text("damaged: [")
    else:
        resume = str(tmp_path / "a" / LAST_NAME)
    raw = raw_config("fsrcnn", pictures, iter_max=2)
    raw["train_dataset"] |= keys
    with caplog.at_level(logging.INFO):
        folder = tmp_path / ("a" if resume == "auto" else "b")
        run(check_config(raw, "fsrcnn"), folder, resume=resume)
    assert "resumed at iteration 1" in caplog.text and " is now " not in caplog.text


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


def test_from_before_a_damaged_checkpoint_it_goes_on_to_the_same_weights(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / LAST_NAME
    run(make_config("fsrcnn", pictures, iter_max=4, iter_save=1), tmp_path)
    straight = checkpoint_of(tmp_path)
    last.write_bytes(last.read_bytes()[:5000])
    assert run(make_config("fsrcnn", pictures, iter_max=4, iter_save=1), tmp_path) == 0
    assert "resumed at iteration 3 from" in caplog.text
    assert not differences(checkpoint_of(tmp_path), straight)
    assert not list(tmp_path.glob("before-*"))


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


def test_nothing_is_moved_before_a_new_run_can_start(pictures: Path, tmp_path: Path) -> None:
    run(make_config("fsrcnn", pictures, iter_max=1), tmp_path)
    raw = raw_config("fsrcnn", pictures)
    raw["train_dataset"]["dataset"]["args"]["root_path"] = "/no"
    with pytest.raises(UserError):
        run(check_config(raw, "x"), tmp_path, resume="never")
    assert (tmp_path / LAST_NAME).exists() and not list(tmp_path.glob("before-*"))


def test_a_seed_that_was_drawn_is_that_of_the_whole_run(pictures: Path, tmp_path: Path) -> None:
    seeds = []
    for end in (1, 2):
        run(make_config("fsrcnn", pictures, iter_max=end, seed=None), tmp_path)
        seeds.append(checkpoint_of(tmp_path)["seed"])
    assert seeds[0] == seeds[1]
