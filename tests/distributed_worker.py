"""One of the processes that tests/test_distributed.py starts, with torchrun's environment.

``python -m tests.distributed_worker JOB FOLDER``
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch

from engine.trainer import Trainer
from tests.training import KEYS, KINDS, SOAP, make_config, raw_config, run
from utils.checkpoint import LAST_NAME
from utils.cli import run as run_script
from utils.config import check_config
from utils.distributed import World, gather_objects, restarts, world
from utils.log import set_up


def every_kind(folder: Path, current: World) -> int:
    """All models, both phases; validation once; and at last what every rank finds wrong."""
    for kind in KINDS:
        init = None
        if kind.endswith("phase1"):
            init = str(folder / "one" / kind.replace("phase1", "phase0") / LAST_NAME)
        config = make_config(kind, folder / "pictures", iter_max=4, iter_save=2)
        run(config, folder / "two" / kind, current, init=init)
    init = str(folder / "one" / "fsrcnn-phase0" / LAST_NAME)
    config = make_config("fsrcnn-phase1", folder / "pictures", iter_max=4, iter_save=2, **KEYS)
    run(config, folder / "two" / "keys", current, init=init)
    init = str(folder / "dead.pth")
    config = make_config("carn", folder / "pictures", iter_max=6, optimizer=SOAP, revive=[0, 3])
    run(config, folder / "two" / "soap", current, init=init)
    data = raw_config("fsrcnn", folder / "pictures")["train_dataset"]
    wrapper = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    valid = {"dataset": data["dataset"], "wrapper": wrapper}
    config = make_config("carn", folder / "pictures", iter_max=1, valid_dataset=valid)
    run(config, folder / "two" / "validated", current)
    return run(make_config("fsrcnn", folder / "no-such-folder"), folder / "wrong", current)


def damaged_picture(folder: Path, current: World) -> int:
    """A picture that one rank meets first."""
    raw = raw_config("fsrcnn", folder / "damaged", iter_max=50)
    raw["train_dataset"]["dataset"]["args"]["cache"] = "none"
    return run(check_config(raw, "fsrcnn"), folder / "damaged-run", current)


def killed_rank(folder: Path, current: World) -> int:
    """The last rank is killed in iteration 4, and once it has been started again in 6."""
    if current.rank == current.size - 1:
        _at_step(5 if restarts() else 3, lambda: _kill(folder / "killed"))
    raw = raw_config("fsrcnn", folder / "pictures", iter_save=2)
    raw["train_dataset"]["num_workers"] = current.size
    return run(check_config(raw, "fsrcnn"), folder / "killed-run", current)


def signalled_rank(folder: Path, current: World) -> int:
    """One rank alone gets SIGTERM."""
    if current.rank == 1:
        _at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    config = make_config("fsrcnn", folder / "pictures", iter_max=1000)
    return run(config, folder / "signalled-run", current)


def closed_terminal(folder: Path, current: World) -> int:
    """The launcher gets SIGHUP."""
    if current.is_main:
        _at_step(2, lambda: os.kill(os.getppid(), signal.SIGHUP))
    ignores = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    config = make_config("fsrcnn", folder / "pictures", iter_max=6 if ignores else 5000)
    return run(config, folder / "run", current)


def skipped_pictures(folder: Path, current: World) -> int:
    """Pictures that one rank meets or both do, with and without loader processes."""
    for cache, workers in (("none", 0), ("none", current.size), ("in_memory", 0)):
        set_up(main=current.is_main)  # a log file for each run
        name = f"{cache}-{workers}"
        raw = raw_config("fsrcnn", folder / "damaged", iter_max=2)
        raw["train_dataset"]["num_workers"] = workers
        raw["train_dataset"]["dataset"]["args"] |= {"cache": cache, "on_error": "skip"}
        run(check_config(raw, name), folder / name, current)
    return 0


def slow_data(folder: Path, current: World) -> int:
    """The data of one rank takes its time; first that of rank 0, then that of the other."""
    read_batch = Trainer._read_batch
    config = make_config("fsrcnn", folder / "pictures", iter_max=4)
    for slow in range(current.size):
        wait_s = 0.5 if current.rank == slow else 0.0

        def read_late(self: Trainer, wait_s: float = wait_s) -> object:
            time.sleep(wait_s)
            return read_batch(self)

        Trainer._read_batch = read_late  # type: ignore[assignment,method-assign]
        run(config, folder / f"slow-{slow}", current)
    return 0


def late_rank(folder: Path) -> int:
    """Rank 1 dies once all have met; started again, it comes when rank 0 has long been looking."""
    late = os.environ["RANK"] == "1"
    if late and restarts():
        time.sleep(2)
    with world("cpu", patience=timedelta(seconds=20)) as current:
        gather_objects(current.rank)
        if late and not restarts():
            _kill(folder / "killed")
        gather_objects(current.rank)
    return 0


def scripts(folder: Path) -> int:
    """The command lines of commands.json, one after the other; how each ended, for rank 0.

    Each joins a group of its own, so that this process must not have joined one.
    """
    rank = os.environ["RANK"]
    with (folder / f"stdout-{rank}.txt").open("w") as output, contextlib.redirect_stdout(output):
        codes = [
            _exit_code(command["words"], command["port"])
            for command in json.loads((folder / "commands.json").read_text())
        ]
    (folder / f"codes-{rank}.json").write_text(json.dumps(codes))
    return 0


def _exit_code(words: list[str], port: int) -> int:
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError(f"{words[0]} does not exit")


def _kill(note: Path) -> None:
    note.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, action: object) -> None:
    iterate = Trainer._iterate

    def iterate_and_act(self: Trainer, current: int, batch: dict) -> dict:
        if current == step:
            action()  # type: ignore[operator]
        return iterate(self, current, batch)

    Trainer._iterate = iterate_and_act  # type: ignore[assignment,method-assign]


JOBS = {
    job.__name__: job
    for job in (
        every_kind,
        damaged_picture,
        skipped_pictures,
        slow_data,
        killed_rank,
        signalled_rank,
        closed_terminal,
    )
}


def main() -> int:
    """Join the group and do the job."""
    deadline = threading.Timer(240, lambda: os._exit(99))  # never outlive the test
    deadline.daemon = True
    deadline.start()
    torch.set_num_threads(1)
    for job in (scripts, late_rank):
        if sys.argv[1] == job.__name__:
            return job(Path(sys.argv[2]))
    with world("cpu") as current:
        set_up(main=current.is_main)
        return JOBS[sys.argv[1]](Path(sys.argv[2]), current)


if __name__ == "__main__":
    try:
        run_script(main)
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # without waiting for the timer
