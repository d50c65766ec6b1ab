"""Starts a script in one process or, through torchrun, in several: what dist.sh runs.

torchrun turns every failure of a script into exit code 1 and a page of its own text. Here the
script's exit code comes through, and of its messages those of rank 0 (or, where rank 0 was well,
those of the rank that failed).
"""

import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from utils.cli import run
from utils.errors import LostConnectionError, UserError
from utils.signals import ending_signals

HELP = """usage: ./dist.sh [words] SCRIPT [the script's arguments and words]

Runs SCRIPT in as many processes as there are GPUs; on a machine without GPUs in one process on
the CPU. They share out the batches of training, and the images of test.py, test_pcsr.py and folder
runs of demo.py. All other arguments go to the script as they are.

words, anywhere on the line (--max-restarts is --max_restarts):
  --gpu LIST          GPUs to use, such as 0,1: one process each. Default: all there are.
  --device DEVICE     auto, cpu, cuda, cuda:N or mps; also given to the script.
  --nproc N           number of processes; with --device cpu they talk through gloo, and the cores
                      are shared out (unless OMP_NUM_THREADS is set).
  --nnodes N, --node_rank R, --master_addr HOST, --master_port PORT, --rdzv_endpoint HOST:PORT,
  --rdzv_id ID, --rdzv_backend NAME, --rdzv_conf CONF
                      several machines: torchrun's words, with its meaning. Without them the
                      processes find each other through a free port.
  --max_restarts N    when a process has ended badly, start all of them again, up to N times;
                      training goes on from its last checkpoint. Default: 0, the first failure
                      ends all. (Mistakes of yours are tried again, too.)
  --                  what follows belongs to the script, whatever it looks like.

exit code: the script's own; 128 + N where signal N ended it; 75 where all that this machine knows
is that a process on another one has ended.

examples:
  ./dist.sh train.py --config configs/carn-x4.yaml --gpu 0
  ./dist.sh train_pcsr.py --config configs/carn-pcsr-phase0.yaml --gpu 0,1
  ./dist.sh train_pcsr.py --config configs/tiny-pcsr-phase0.yaml --device cpu --nproc 2
  ./dist.sh test_pcsr.py --config configs/carn-pcsr-phase1.yaml --hr_data load/Test8K/HR
  ./dist.sh train.py --config configs/carn-x4.yaml --nnodes 2 --node_rank 0 \\
      --master_addr 10.0.0.1 --master_port 29400
"""

OWN_WORDS = ("gpu", "device", "nproc")
TORCHRUN_WORDS = (
    *("nnodes", "node_rank", "master_addr", "master_port", "max_restarts"),
    *("rdzv_endpoint", "rdzv_id", "rdzv_backend", "rdzv_conf"),
)
# Signs of a GPU: a container may have the driver's files without its tools.
GPU_TOOLS = ("nvidia-smi", "rocm-smi")
GPU_FILES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
# For the processes: when the run was launched, in seconds since the epoch.
LAUNCH_TIME = "PCSR_LAUNCH_TIME"
STDERR = 2  # torchrun's number for it in --redirects
LINES_SHOWN = 30
# How torchrun ends the other processes when one has failed.
ENDING = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Request:
    """A command line, sorted.

    Attributes:
        script: path of the script.
        script_args: what it gets.
        words: value of each word of ours that was given, by name, with underscores.
    """

    script: str = ""
    script_args: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)

    @property
    def torchrun_words(self) -> list[str]:
        """The words that torchrun gets, as it spells them."""
        given = [(name, self.words[name]) for name in TORCHRUN_WORDS if name in self.words]
        return [part for name, value in given for part in (f"--{name.replace('_', '-')}", value)]


def parse(arguments: Sequence[str]) -> Request:
    """Sort `arguments` into ours and the script's.

    Raises:
        UserError: no script, a script that is not there, or one of our words without its value.
    """
    request = Request()
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if argument == "--":
            request.script_args += rest
            break
        if argument.startswith("--") and name in OWN_WORDS + TORCHRUN_WORDS:
            if not equals and not rest:
                raise UserError(f"{argument} needs a value (see ./dist.sh --help)")
            request.words[name] = value if equals else rest.pop(0)
        elif request.script or argument.startswith("-"):
            request.script_args.append(argument)
        else:
            request.script = argument
    if not request.script:
        raise UserError("no script given: ./dist.sh SCRIPT ... (see ./dist.sh --help)")
    if not Path(request.script).is_file():
        raise UserError(f"no such script: {request.script}")
    return request


def choose_gpus(wanted: str, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for ``--gpu wanted`` where `visible` is its value now.

    As everywhere in CUDA, an index counts the GPUs that are visible.
    """
    indices = [part.strip() for part in wanted.split(",")]
    if not all(part.isdecimal() for part in indices) or len(set(indices)) < len(indices):
        raise UserError(f"--gpu {wanted}: expected different GPU numbers, such as 0 or 0,1")
    if visible is None:
        return ",".join(indices)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if any(int(index) >= len(names) for index in indices):
        raise UserError(f"--gpu {wanted}: CUDA_VISIBLE_DEVICES={visible} shows {len(names)} GPUs")
    return ",".join(names[int(index)] for index in indices)


def count_gpus() -> int:
    """GPUs that this process can see."""
    if not any(map(shutil.which, GPU_TOOLS)) and not any(path.exists() for path in GPU_FILES):
        return 0
    import torch  # takes seconds, and machines without GPUs need not wait for it

    return torch.cuda.device_count()


def choose_processes(words: Mapping[str, str]) -> int:
    """Number of processes on this machine; CUDA_VISIBLE_DEVICES is set already."""
    device = words.get("device", "auto")
    if "nproc" in words:
        if not words["nproc"].isdecimal() or int(words["nproc"]) < 1:
            raise UserError(f"--nproc {words['nproc']}: expected a whole number from 1 on")
        count = int(words["nproc"])
        if count > 1 and device.partition(":")[0] != "cpu" and count > count_gpus():
            raise UserError(
                f"--nproc {count}: there are {count_gpus()} GPUs; for processes on the CPU add "
                "--device cpu"
            )
        return count
    if "gpu" in words:
        wanted = words["gpu"].count(",") + 1
        if wanted > 1 and count_gpus() < wanted:
            raise UserError(f"--gpu {words['gpu']}: only {count_gpus()} of these GPUs are there")
        return wanted
    return max(1, count_gpus()) if device in ("auto", "cuda") else 1


def share_out_cores(environment: Mapping[str, str], processes: int) -> str:
    """OMP_NUM_THREADS for each of `processes` on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return environment.get("OMP_NUM_THREADS") or str(max(1, (cores or 1) // processes))


def run_alone(request: Request) -> NoReturn:
    """Become the script: signals, output and exit code are its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, request.script, *request.script_args])


def torchrun_words(request: Request, processes: int, logs: str) -> list[str]:
    """torchrun's arguments before the script; `logs` is a folder for what is not shown."""
    words = ["--nproc-per-node", str(processes), "--log-dir", logs, *request.torchrun_words]
    # By default torchrun handles SIGHUP under `nohup`, too.
    handled = [*ending_signals(), *([signal.SIGQUIT] if hasattr(signal, "SIGQUIT") else [])]
    words += ["--signals-to-handle", ",".join(number.name for number in handled)]
    if processes > 1:
        quiet = (f"{rank}:{STDERR}" for rank in range(1, processes))
        words += ["--redirects", ",".join(quiet)]
    given = set(request.words)
    if "rdzv_endpoint" in given and not given & {"node_rank", "rdzv_backend"}:
        words += ["--rdzv-backend", "c10d"]  # as torchrun's default wants numbered machines
    if not given & {*TORCHRUN_WORDS} - {"max_restarts"}:
        # A free port; and by number, as many containers cannot look their own name up.
        words += ["--standalone", "--local-addr", "127.0.0.1"]
    return words


def run_many(request: Request, processes: int) -> int:
    """Run the script under torchrun. Returns its exit code."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # torchrun's account of failures, in this process only
    with tempfile.TemporaryDirectory(prefix="dist-") as logs:
        words = torchrun_words(request, processes, logs)
        try:
            torchrun.run(torchrun.parse_args([*words, request.script, *request.script_args]))
        except ChildFailedError as error:
            codes = {failure.local_rank: failure.exitcode for failure in error.failures.values()}
            culprit = find_culprit(codes)
            _explain(culprit, codes, Path(logs))
            return _exit_code(codes[culprit])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _exit_code(code: int) -> int:
    """A process's exit code as the shell has it."""
    return 128 - code if code < 0 else code


def find_culprit(codes: Mapping[int, int]) -> int:
    """The process that failed first, from exit codes by local rank.

    Processes that ended together stand in the order of their ranks, so that those which lost
    their connection to it, or were ended because of it by signal, may stand before it.
    """
    ended = {-number for number in ENDING} | {128 + number for number in ENDING}
    lost = {LostConnectionError.exit_code}
    for others in (ended | lost, ended):
        for rank, code in codes.items():
            if code not in others:
                return rank
    return next(iter(codes))


def _explain(culprit: int, codes: Mapping[int, int], logs: Path) -> None:
    """Say what the screen does not show yet about the failure of local rank `culprit`."""
    code = codes[culprit]
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        name = signal.Signals(-code).name
        print(f"error: process {culprit} was ended by {name}{hint}", file=sys.stderr)
    if culprit == 0 or codes.get(0) == code:
        return  # the message of process 0 is on the screen
    for path in sorted(logs.glob(f"*/attempt_*/{culprit}/stderr.log"))[-1:]:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        sys.stderr.writelines(f"{line}\n" for line in lines[-LINES_SHOWN:])


def main() -> int:
    """Command line; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return 0
    request = parse(arguments)
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{sys.executable} has no torch: run `make venv` once, then try again")
    words = request.words
    if "gpu" in words:
        if words.get("device", "auto") not in ("auto", "cuda"):
            raise UserError(f"--gpu {words['gpu']} and --device {words['device']} contradict")
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = choose_gpus(words["gpu"], visible)
        words["device"] = "cuda"
    if "device" in words:
        request.script_args += ["--device", words["device"]]
    asks_help = {"-h", "--help"} & set(request.script_args)
    processes = 1 if asks_help else choose_processes(words)
    if processes == 1 and not request.torchrun_words:
        run_alone(request)
    os.environ["OMP_NUM_THREADS"] = share_out_cores(os.environ, processes)
    os.environ[LAUNCH_TIME] = str(time.time())
    if "rdzv_endpoint" in words:
        # Such machines need not start equally often: a new store for each start, see
        # `utils.distributed`.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return run_many(request, processes)


if __name__ == "__main__":
    run(main)
