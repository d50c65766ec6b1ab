"""Trainings one after the other, each in a process of its own, until their time is up."""

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import newest_iteration
from engine.start import is_at_end
from engine.stop import StopSignal
from utils.checkpoint import LAST_NAME, RELEASE_NAME, load_checkpoint
from utils.cli import one_line
from utils.config import Config
from utils.errors import UserError
from utils.release import release
from utils.run_metrics import METRICS_NAME, read_rows

ROOT = Path(__file__).resolve().parent.parent
_POLL_S = 0.1
FAILED = "failed"
# Exit codes of a training that was asked to stop and has saved: by SIGTERM, Ctrl-C or SIGHUP.
_STOPPED = (143, 130, 129)


@dataclass(frozen=True)
class Job:
    """One config to be trained.

    Attributes:
        path: of the config.
        config: what it says.
        folder: of the run.
    """

    path: Path
    config: Config
    folder: Path

    @property
    def iteration(self) -> int:
        """Iterations done; of released weights alone, where nothing is left to do after theirs."""
        if (self.folder / LAST_NAME).is_file():
            return newest_iteration(self.folder / LAST_NAME)
        released = _iteration(self.folder / RELEASE_NAME)
        return released if released >= self.config.iter_max else 0

    @property
    def is_finished(self) -> bool:
        """Whether all iterations are done, and the last validation."""
        if (self.folder / LAST_NAME).is_file():
            # A damaged one is none: training goes on from an older one and mends it.
            return is_at_end(self.config, self.folder, _iteration(self.folder / LAST_NAME))
        return self.iteration >= self.config.iter_max

    def command(self, words: Sequence[str]) -> list[str]:
        """What trains it, as ./dist.sh would: on all GPUs, or in one process on the CPU."""
        script = "train.py" if self.config.phase is None else "train_pcsr.py"
        where = ["--config", str(self.path), "--save_dir", str(self.folder)]
        return [sys.executable, "-m", "utils.launch", str(ROOT / script), *where, *words]

    def describe(self, state: str) -> str:
        """Its state on one line."""
        found = _last_validation(self.folder / METRICS_NAME)
        shown = ""
        if found is not None:
            psnr, iteration = found
            shown = f", validation {psnr:.2f} dB"
            shown += f" at iteration {iteration}" if iteration != self.iteration else ""
        return (
            f"{self.config.name}: {state}, "
            f"{self.iteration} of {self.config.iter_max} iterations{shown}"
        )


def train_all(
    jobs: Sequence[Job], end_s: float, words: Sequence[str], margin_s: float, stop: StopSignal
) -> dict[str, str]:
    """Train the jobs one after the other until `end_s` (of `time.monotonic`).

    Returns:
        the state of each by its config's name; FAILED begins that of those that did.
    """
    states: dict[str, str] = {}
    for job in jobs:
        try:
            states[job.config.name] = _advance(job, jobs, end_s, words, margin_s, stop)
        except (UserError, ValueError, OSError) as error:
            states[job.config.name] = f"{FAILED}: {one_line(error)}"
    return states


def _advance(
    job: Job,
    jobs: Sequence[Job],
    end_s: float,
    words: Sequence[str],
    margin_s: float,
    stop: StopSignal,
) -> str:
    if job.is_finished:
        return _released(job)
    if (missing := _missing_phase0(job, jobs)) is not None:
        return f"waits for {missing}"
    if stop.number or time.monotonic() >= end_s - margin_s:
        return "no time left"
    code = _train(job, end_s, words, margin_s, stop)
    if code == 0 and job.is_finished:
        return _released(job)
    return "stopped" if code in _STOPPED else f"{FAILED} with exit code {code}"


def _released(job: Job) -> str:
    """Make release.pth of a finished run where that has not been done."""
    last, made = job.folder / LAST_NAME, job.folder / RELEASE_NAME
    if last.is_file() and not (made.is_file() and made.stat().st_mtime >= last.stat().st_mtime):
        release(job.folder)
    return "finished"


def _missing_phase0(job: Job, jobs: Sequence[Job]) -> str | None:
    """The phase 0 that has to be trained before this job; None where there is none."""
    if job.config.phase != 1 or job.config.init is not None:
        return None
    name = job.config.name.replace("phase1", "phase0")
    for other in jobs:
        if other is not job and other.config.name == name:
            return None if other.is_finished else name
    return None  # the training finds phase 0's weights itself, or says that there are none


def _train(job: Job, end_s: float, words: Sequence[str], margin_s: float, stop: StopSignal) -> int:
    """Run the training until it ends or its time does. Returns its exit code, as a shell has it."""
    print(f"{job.config.name}: from iteration {job.iteration}", flush=True)
    process = subprocess.Popen(job.command(words), cwd=ROOT)
    is_asked = False
    while process.poll() is None:
        now = time.monotonic()
        if not is_asked and (stop.number or now >= end_s - margin_s):
            process.terminate()
            is_asked, end_s = True, max(end_s, now + margin_s)
        elif is_asked and now >= end_s:
            # Its last checkpoint is whole, however it ends: it was asked to stop, and has.
            process.kill()
            process.wait()
            return _STOPPED[0]
        time.sleep(_POLL_S)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _iteration(path: Path) -> int:
    """A checkpoint's iteration; 0 where there is none, or a damaged one."""
    try:
        return int(load_checkpoint(path).get("iter", 0))
    except UserError:
        return 0


def _last_validation(path: Path) -> tuple[float, int] | None:
    """The last validation PSNR of a metrics.jsonl, and its iteration."""
    rows = read_rows(path)[0] if path.is_file() else []
    found = [row for row in rows if row["kind"] == "valid" and row.get("psnr") is not None]
    return (float(found[-1]["psnr"]), int(found[-1]["iteration"])) if found else None
