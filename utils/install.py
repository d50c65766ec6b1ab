"""Sets up the virtual environment that `make` uses. Standard library only, as nothing is there yet.

Run it as ``python3 -I utils/install.py``: isolated, so that this folder's module names cannot
stand in for the standard library's.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
CONSTRAINTS = "constraints.txt"
# PyTorch's own index of builds without CUDA: 0.2 GB to fetch instead of 3 GB.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Where pip may have been told to find other builds than those of the default index.
PIP_SOURCES = ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_INDEX_URL")
NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"
CUDA_VERSION = "import torch; print(torch.version.cuda or '')"
CUDA_WORKS = "import torch; print('yes' if torch.cuda.is_available() else '')"


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


def has_nvidia_gpu() -> bool:
    """True where NVIDIA's driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def torch_version() -> str:
    """The version of torch that constraints.txt pins."""
    for line in (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name.strip() == "torch":
            return version.strip()
    raise SetupError(f"{CONSTRAINTS} does not pin torch")


def torch_requirement(gpu: bool) -> str:
    """What to ask pip for.

    ``==`` accepts every build of the version; a CPU build found first, say among wheels on disk,
    is labelled ``+cpu`` and sorts before the default one. ``===`` compares letter by letter, so
    only the default build will do, which on Linux is the one with CUDA.
    """
    return f"torch{'===' if gpu else '=='}{torch_version()}"


def install_command(python: Path, dev: bool, gpu: bool, cpu_index: bool = False) -> list[str]:
    """The pip call that installs everything."""
    command = [*pip(python), "install", "--constraint", CONSTRAINTS, torch_requirement(gpu)]
    for name in REQUIREMENTS[: 1 + dev]:
        command += ["--requirement", name]
    return [*command, "--extra-index-url", CPU_INDEX] if cpu_index else command


def cuda_command(python: Path) -> list[str]:
    """The pip call that replaces a build of torch without CUDA; for :func:`default_index`."""
    wanted = torch_requirement(gpu=True)
    return [*pip(python), "install", "--force-reinstall", "--constraint", CONSTRAINTS, wanted]


def default_index(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with every setting gone that makes pip look beside its default index."""
    kept = {name: value for name, value in environment.items() if name not in PIP_SOURCES}
    return {**kept, "PIP_CONFIG_FILE": os.devnull}


def pip(python: Path) -> list[str]:
    """How pip is called."""
    return [str(python), "-m", "pip", "--disable-pip-version-check"]


def cpu_index_answers() -> bool:
    """True where PyTorch's index of CPU builds applies and can be reached."""
    if not sys.platform.startswith("linux") or any(os.environ.get(key) for key in PIP_SOURCES):
        return False
    import urllib.request  # slow to import, and rarely needed

    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):
            return True
    except (OSError, ValueError):
        return False


def digest() -> str:
    """Changes when the packages to install may have changed."""
    content = hashlib.sha256()
    for name in (*REQUIREMENTS, CONSTRAINTS):
        content.update((ROOT / name).read_bytes())
    return content.hexdigest()


def is_ready(stamp: Path, dev: bool, gpu: bool) -> bool:
    """True where `stamp` says that an earlier run installed all that is asked for now."""
    try:
        done = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    had = [done.get(key, False) for key in ("dev", "gpu")]
    return done.get("digest") == digest() and had[0] >= dev and had[1] >= gpu


def make_venv(folder: Path) -> Path:
    """Create the virtual environment unless it works already; returns its Python."""
    python = folder / "bin" / "python"
    if succeeds([python, "-c", ""]) and not succeeds([python, "-c", NEW_ENOUGH]):
        raise SetupError(f"{folder} holds a Python older than 3.11: move it away, then try again")
    if succeeds([python, "-m", "pip", "--version"]):
        return python
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise SetupError(
            f"{sys.executable} lacks the venv module: install it (Debian, Ubuntu: "
            f"apt-get install python{version}-venv) or name another Python: make PYTHON=..."
        )
    print(f"set-up: creating {folder} with Python {sys.version.split()[0]}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", str(folder)]).returncode:
        raise SetupError(f"{folder} cannot be created; the reason is above")
    return python


def succeeds(command: Sequence[str | Path]) -> bool:
    """True where `command` runs and exits with 0; its output is dropped."""
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def ask(python: Path, program: str) -> str:
    """What `program` prints under `python`; empty where it fails."""
    return subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()


def run_pip(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a pip call in the repository's root; SetupError where it fails."""
    print(f"set-up: {shlex.join(command)}", flush=True)
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise SetupError(
            "pip could not install the packages; its message is above. It needs the network: is "
            "the package index reachable from here (behind a proxy, set HTTPS_PROXY)? Then run "
            "make again"
        )


def ensure_cuda(python: Path) -> None:
    """Make sure that torch is a CUDA build. SetupError where none can be had."""
    if not ask(python, CUDA_VERSION):
        print("set-up: there is an NVIDIA GPU, but torch was built without CUDA: replacing it")
        run_pip(cuda_command(python), default_index(os.environ))
    if not ask(python, CUDA_VERSION):
        raise SetupError(
            "there is an NVIDIA GPU, but no build of torch with CUDA for this machine; "
            "to go on without the GPU: make TORCH=cpu ..."
        )
    if not ask(python, CUDA_WORKS):
        print(
            f"set-up: note: torch was built for CUDA {ask(python, CUDA_VERSION)} but finds no "
            "usable GPU (a driver older than that?): everything will run on the CPU"
        )


def set_up(folder: Path, dev: bool, gpu: bool, dry_run: bool) -> None:
    """Bring `folder` up to date; returns at once where it is."""
    stamp = folder / "installed.json"
    python = folder / "bin" / "python"
    if dry_run:
        print("GPU: yes, torch with CUDA" if gpu else "GPU: no, any build of torch")
        print(shlex.join(install_command(python, dev, gpu)))
        return
    if python.exists() and is_ready(stamp, dev, gpu):
        return
    python = make_venv(folder)
    stamp.unlink(missing_ok=True)
    try:
        run_pip(install_command(python, dev, gpu, not gpu and cpu_index_answers()))
    except SetupError:
        if not gpu:
            raise
        # The exact build may be missing where pip was told to look; then it is replaced below.
        run_pip(install_command(python, dev, gpu=False))
    if gpu:
        ensure_cuda(python)
    done = {"digest": digest(), "dev": dev, "gpu": gpu}
    stamp.write_text(json.dumps(done), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Create the virtual environment, or bring it up to date."
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder")
    parser.add_argument("--dev", action="store_true", help="install what the tests need, too")
    parser.add_argument(
        "--torch",
        choices=("auto", "cpu"),
        default="auto",
        help="auto insists on a CUDA build where there is an NVIDIA GPU; cpu takes any build",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be installed")
    options = parser.parse_args(arguments)
    try:
        gpu = options.torch == "auto" and has_nvidia_gpu()
        set_up(options.venv.absolute(), options.dev, gpu, options.dry_run)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
