"""Several processes: the result of one, and one clear end."""

import signal
import time
from pathlib import Path

import pytest
import torch

from datasets.sampling import IterationBatchSampler
from tests.processes import free_port, handling, launch, lines, start
from tests.training import (
    KEYS,
    KINDS,
    SOAP,
    checkpoint_of,
    differences,
    make_config,
    make_pictures,
    metrics_of,
    raw_config,
    run,
    with_dead_units,
)
from utils.checkpoint import LAST_NAME
from utils.distributed import (
    World,
    fail_together,
    gather_objects,
    max_over_ranks,
    on_main,
    together,
)
from utils.errors import UserError

WORKER = "tests/distributed_worker.py"


def test_two_processes_give_the_weights_of_one(tmp_path: Path) -> None:
    """To the bit, for every model and phase, batch statistics and optimiser included.

    The processes end with a mistake that both make, of which only rank 0 speaks.
    """
    pictures = make_pictures(tmp_path / "pictures")
    for kind in KINDS:
        run(make_config(kind, pictures, iter_max=4), tmp_path / "one" / kind)
    config = make_config("fsrcnn-phase1", pictures, iter_max=4, **KEYS)
    run(config, tmp_path / "one" / "keys", init=str(tmp_path / "one/fsrcnn-phase0" / LAST_NAME))
    with_dead_units(tmp_path / "one" / "carn" / LAST_NAME, tmp_path / "dead.pth")
    config = make_config("carn", pictures, iter_max=6, optimizer=SOAP, revive=[0, 3])
    run(config, tmp_path / "one" / "soap", init=str(tmp_path / "dead.pth"))
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    data = raw_config("fsrcnn", pictures)["train_dataset"]
    valid = {"dataset": data["dataset"], "wrapper": wrapper}
    config = make_config("carn", pictures, iter_max=1, valid_dataset=valid)
    run(config, tmp_path / "one" / "validated")

    ended = start("every_kind", tmp_path)
    assert [code for code, _ in ended] == [2, 2], ended
    (line,) = lines(ended[0][1])
    assert "no-such-folder" in line
    assert ended[1][1].strip() == "", "rank 1 says nothing"
    for kind in (*KINDS, "keys", "soap", "validated"):
        one, two = (checkpoint_of(tmp_path / count / kind) for count in ("one", "two"))
        assert not differences(one, two), kind
    rows = [metrics_of(tmp_path / count / "validated") for count in ("one", "two")]
    figures = [[r for r in found if r["kind"] == "valid"] for found in rows]
    assert figures[0] == figures[1] and len(figures[0]) == 1


def test_damaged_picture_on_one_rank_ends_all_with_one_line(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "damaged", count=9)
    path = folder / "4.png"
    path.write_bytes(path.read_bytes()[:300])
    ended = start("damaged_picture", tmp_path)
    assert [code for code, _ in ended] == [2, 2], ended
    (line,) = lines(ended[0][1] + ended[1][1])
    assert "4.png" in line and lines(ended[0][1]) == [line]


def test_skipped_pictures_of_any_process_are_in_the_log_once(tmp_path: Path) -> None:
    """Two iterations of four samples take eight of nine pictures, each on one rank alone."""
    folder = make_pictures(tmp_path / "damaged", count=9)
    ranks = [
        IterationBatchSampler(length=9, batch_size=4, seed=0, stop=2, rank=rank, world_size=2)
        for rank in range(2)
    ]
    damaged = [folder / f"{next(iter(sampler))[0].index}.png" for sampler in ranks]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    ended = start("skipped_pictures", tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    for name in ("none-0", "none-2", "in_memory-0"):
        log = (tmp_path / name / "log.txt").read_text(encoding="utf-8")
        told = [line for line in log.splitlines() if "skipped, the next one" in line]
        assert [sum(str(path) in line for line in told) for path in damaged] == [1, 1], (name, log)
        assert len(told) == 2
    assert ended[0][1].count("skipped, the next one") == 6 and ended[1][1].strip() == ""


def test_a_killed_rank_starts_all_again_until_that_is_enough(tmp_path: Path) -> None:
    """Each time from the last checkpoint, to the weights of a run that nothing disturbed.

    The end comes within a minute, without a word of the loaders that have lost their process.
    """
    pictures = make_pictures(tmp_path / "pictures")
    ended = launch("--nproc", "2", "--max-restarts", "1", WORKER, "killed_rank", str(tmp_path))
    assert time.time() - (tmp_path / "killed").stat().st_mtime < 60
    assert ended.returncode == 128 + 9, ended.stderr
    assert "a process had ended: all are started again (1 of 1)" in ended.stderr
    assert "resumed at iteration 2" in ended.stderr
    *others, error = lines(ended.stderr)
    assert error == "error: process 1 was ended by SIGKILL (out of memory?)"
    lost = "error: process 0 lost the connection: another process of this run has ended"
    assert set(others) <= {lost}, ended.stderr

    config = make_config("fsrcnn", pictures)
    run(config, tmp_path / "killed-run")
    run(config, tmp_path / "undisturbed")
    one, two = (checkpoint_of(tmp_path / name) for name in ("undisturbed", "killed-run"))
    assert not differences(one, two)


@pytest.mark.parametrize(
    "meeting",
    [
        [],
        ["--node-rank=0", "--master-addr=127.0.0.1", "--master-port={port}"],
        ["--nnodes=1", "--rdzv-endpoint=127.0.0.1:{port}"],
    ],
    ids=["free port", "given port", "rendezvous"],
)
def test_processes_that_start_again_do_not_look_for_those_before(
    meeting: list[str], tmp_path: Path
) -> None:
    """torchrun 2.13 keeps the store, in which the addresses of the dead ones still stand."""
    words = [word.format(port=free_port()) for word in meeting]
    ended = launch("--nproc=2", "--max-restarts=1", *words, WORKER, "late_rank", str(tmp_path))
    assert (tmp_path / "killed").exists()
    assert ended.returncode == 0, ended.stderr


def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures")
    ended = start("signalled_rank", tmp_path)
    assert [code for code, _ in ended] == [143, 143], ended
    assert checkpoint_of(tmp_path / "signalled-run")["iter"] == 3
    assert (tmp_path / "signalled-run" / LAST_NAME).is_file()


@pytest.mark.parametrize(("action", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)])
def test_a_closed_terminal_saves_and_ends_all_unless_under_nohup(
    action: signal.Handlers, code: int, tmp_path: Path
) -> None:
    make_pictures(tmp_path / "pictures")
    with handling(signal.SIGHUP, action):
        ended = launch("--nproc=2", WORKER, "closed_terminal", str(tmp_path))
    assert ended.returncode == code, ended.stderr
    done = checkpoint_of(tmp_path / "run")["iter"]
    assert done == 6 if code == 0 else 3 <= done < 5000


def test_waiting_for_another_rank_is_not_waiting_for_data(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures")
    ended = start("slow_data", tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    own, other = (
        [row["data_share"] for row in metrics_of(tmp_path / f"slow-{rank}")] for rank in range(2)
    )
    # Where it is the other's that is slow, rank 0 waits as long, but for the other.
    assert min(own) > 0.5 and max(other) < 0.25, (own, other)


def test_one_process_needs_no_group() -> None:
    def fail() -> None:
        raise FileNotFoundError("x")

    assert on_main(lambda: 3) == together(lambda: 3) == 3
    assert gather_objects("a") == ["a"] and max_over_ranks([1, 2]) == [1, 2]
    assert World(0, 1, torch.device("cpu")).is_main
    fail_together(None)
    with pytest.raises(UserError, match="broken"):
        fail_together("broken")
    with pytest.raises(FileNotFoundError):
        together(fail)
