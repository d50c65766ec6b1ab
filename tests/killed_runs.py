"""Trains a small network that is killed again and again, and once more undisturbed.

``python -m tests.killed_runs FOLDER WORKERS``: leaves the runs FOLDER/killed and FOLDER/straight.
Every attempt is a fork of this process, which has imported everything.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.training import make_config, make_pictures, raw_config, run
from utils.config import Config
from utils.log import set_up

KILLS = 10
ITERATIONS = 60


def small_config(pictures: Path, workers: int) -> Config:
    """A run that saves, prints and validates often, with everything on that has a state."""
    data = raw_config("fsrcnn", pictures)["train_dataset"]
    whole = {"name": "sr-implicit-downsampled", "args": {"scale": 4}}
    return make_config(
        "fsrcnn",
        pictures,
        model={"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1}},
        train_dataset={**data, "num_workers": workers},
        valid_dataset={"dataset": data["dataset"], "wrapper": whole},
        ema=0.9,
        warmup=20,
        grad_clip=0.5,
        iter_max=ITERATIONS,
        iter_print=1,
        iter_save=2,
        iter_val=20,
    )


def start(config: Config, folder: Path) -> int:
    """Train in a new process; returns its id."""
    child = os.fork()
    if child == 0:
        os._exit(run(config, folder))
    return child


def wait_for(folder: Path, iteration: int) -> None:
    """Wait until a run has reported `iteration`."""
    metrics = folder / "metrics.jsonl"
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["iteration"] >= iteration:
            return
        time.sleep(0.002)
    raise TimeoutError(f"{folder} did not reach iteration {iteration}")


def main() -> None:
    """Kill one run ten times, at moments that are drawn; leave another alone."""
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    set_up()
    config = small_config(make_pictures(folder / "pictures"), workers)
    draw = random.Random(workers)
    for iteration in sorted(draw.sample(range(1, ITERATIONS - 5), KILLS)):
        child = start(config, folder / "killed")
        wait_for(folder / "killed", iteration)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"the run ended with {status} before it was killed")
    for name in ("killed", "straight"):
        _, status = os.waitpid(start(config, folder / name), 0)
        if status:
            sys.exit(f"{name} ended with {status}")


if __name__ == "__main__":
    main()
