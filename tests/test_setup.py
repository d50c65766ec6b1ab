"""From a bare machine to a running script: what `make` installs, and what dist.sh starts."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from utils import install, launch
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# What a package is called where it is imported.
IMPORTED_AS = {
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "tensorboardx": "tensorboardX",
}
GPU_LISTED = "echo 'GPU 0: NVIDIA H100 (UUID: GPU-0)'"
DRIVER_BROKEN = "echo 'NVIDIA-SMI has failed: no driver'; exit 9"


def requirements(name: str) -> dict[str, str]:
    """Package names, in lower case, and the versions that stand after == or >=."""
    lines = (re.split("[#;]", line)[0].strip() for line in (ROOT / name).read_text().splitlines())
    parts = (re.split("==|>=", line) for line in lines if line)
    return {part[0].lower(): part[1] for part in parts}


def release(version: str) -> tuple[int, ...]:
    """A version's numbers, for comparing."""
    return tuple(int(number) for number in version.split("."))


# Requirements


@pytest.mark.parametrize("name", install.REQUIREMENTS)
def test_every_requirement_is_pinned_at_or_above_its_lower_bound(name: str) -> None:
    pins = requirements(install.CONSTRAINTS)
    for package, lowest in requirements(name).items():
        assert release(pins[package]) >= release(lowest), package


def test_every_import_is_required() -> None:
    packages = {**requirements("requirements.txt"), **requirements("requirements-dev.txt")}
    known = {IMPORTED_AS.get(package, package) for package in packages} | sys.stdlib_module_names
    known |= {"triton"}  # comes with CUDA builds of torch; without it the kernels are not used
    own = {path.name.removesuffix(".py") for path in ROOT.iterdir()}
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or "local" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for module in (name.partition(".")[0] for name in names):
                assert module in known | own, f"{path.relative_to(ROOT)} imports {module}"


# utils/install.py


def fake_nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stand-in for NVIDIA's tool first on PATH."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("script", "words", "wanted"),
    [
        (GPU_LISTED, [], "torch==="),
        (GPU_LISTED, ["--torch", "cpu"], "torch=="),
        (DRIVER_BROKEN, [], "torch=="),
        ("exit 0", [], "torch=="),
    ],
    ids=["gpu", "gpu not wanted", "broken driver", "no gpu"],
)
def test_cuda_build_is_asked_for_where_there_is_a_gpu(
    script: str,
    words: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_nvidia_smi(tmp_path, script, monkeypatch)
    assert install.main(["--dry-run", *words]) == 0
    assert f" {wanted}{install.torch_version()} " in capsys.readouterr().out


class FakePip:
    """Notes pip calls; torch has CUDA after the `cures`-th of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cures: int) -> None:
        self.calls: list[dict[str, str]] = []
        self.cures = cures
        monkeypatch.setattr(install, "run_pip", self.run)
        monkeypatch.setattr(install, "ask", self.ask)

    def run(self, command: list[str], environment: dict[str, str]) -> None:
        assert f"torch==={install.torch_version()}" in command
        self.calls.append(environment)

    def ask(self, python: Path, program: str) -> str:
        return "13.0" if len(self.calls) >= self.cures else ""


def test_build_without_cuda_is_replaced_from_the_default_index(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    fake = FakePip(monkeypatch, cures=1)
    install.ensure_cuda(Path("python"))
    (environment,) = fake.calls
    assert "PIP_FIND_LINKS" not in environment
    assert environment["PIP_CONFIG_FILE"] == os.devnull
    assert environment["HTTPS_PROXY"] == "http://proxy"
    assert "built without CUDA" in capsys.readouterr().out


def test_build_with_cuda_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePip(monkeypatch, cures=0)
    install.ensure_cuda(Path("python"))
    assert not fake.calls


def test_no_cuda_build_to_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(monkeypatch, cures=2)
    with pytest.raises(install.SetupError, match="make TORCH=cpu"):
        install.ensure_cuda(Path("python"))


def test_stamp_serves_what_it_covers(tmp_path: Path) -> None:
    stamp = tmp_path / "installed.json"
    assert not install.is_ready(stamp, dev=False, gpu=False)
    stamp.write_text(f'{{"digest": "{install.digest()}", "dev": true, "gpu": false}}')
    assert install.is_ready(stamp, dev=False, gpu=False)
    assert install.is_ready(stamp, dev=True, gpu=False)
    assert not install.is_ready(stamp, dev=True, gpu=True)
    stamp.write_text('{"digest": "of other requirements", "dev": true, "gpu": true}')
    assert not install.is_ready(stamp, dev=False, gpu=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_says_which_python_is_needed() -> None:
    command = ["make", "demo", "PYTHON=no-such-python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Python 3.11 or newer is needed" in done.stderr.splitlines()[0]


# dist.sh


def test_words_are_sorted_and_the_rest_is_left_alone() -> None:
    line = ["--nproc=2", __file__, "--config", "a b.yaml", "--gpu", "0,1", "--node-rank", "1"]
    request = launch.parse([*line, "--set", "x=1", "--", "--gpu", "7"])
    assert request.script == __file__
    assert request.script_args == ["--config", "a b.yaml", "--set", "x=1", "--gpu", "7"]
    assert request.words == {"nproc": "2", "gpu": "0,1", "node_rank": "1"}
    assert request.torchrun_words == ["--node-rank", "1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([], "no script given"),
        (["nowhere.py"], "no such script"),
        ([__file__, "--gpu"], "needs a value"),
    ],
)
def test_bad_lines_are_refused(line: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch.parse(line)


def test_gpu_numbers_count_the_visible_gpus() -> None:
    assert launch.choose_gpus("0, 1", None) == "0,1"
    assert launch.choose_gpus("1", "4,6") == "6"
    for wanted, visible in (("x", None), ("0,0", None), ("", None), ("2", "4,6")):
        with pytest.raises(UserError, match="--gpu"):
            launch.choose_gpus(wanted, visible)


@pytest.mark.parametrize(
    ("words", "gpus", "processes"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"device": "cuda"}, 4, 4),
        ({"device": "cuda:1"}, 4, 1),
        ({"device": "cpu"}, 4, 1),
        ({"device": "cpu", "nproc": "3"}, 0, 3),
        ({"device": "cuda", "gpu": "0,1"}, 2, 2),
        ({"nproc": "2"}, 4, 2),
    ],
)
def test_number_of_processes(
    words: dict[str, str], gpus: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    assert launch.choose_processes(words) == processes


@pytest.mark.parametrize("sign", ["tool", "file", None])
def test_gpus_are_asked_for_where_there_is_a_sign_of_them(
    sign: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = "/bin/nvidia-smi" if sign == "tool" else None
    monkeypatch.setattr("shutil.which", lambda tool: found)
    file = tmp_path / "nvidiactl"
    if sign == "file":
        file.touch()
    monkeypatch.setattr(launch, "GPU_FILES", (tmp_path / "kfd", file))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert launch.count_gpus() == (0 if sign is None else 3)


@pytest.mark.parametrize("words", [{"nproc": "2"}, {"nproc": "0"}, {"gpu": "0,1"}])
def test_more_processes_than_gpus_are_refused(
    words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 1)
    with pytest.raises(UserError):
        launch.choose_processes(words)


def test_the_process_that_failed_first_is_found_among_those_it_took_along() -> None:
    assert launch.find_culprit({0: 143, 1: 2}) == 1
    assert launch.find_culprit({0: -15, 1: -9}) == 1
    assert launch.find_culprit({0: 2, 1: 2}) == 0
    assert launch.find_culprit({0: 143, 1: 143}) == 0
    assert launch.find_culprit({0: 75, 1: -9}) == 1
    assert launch.find_culprit({0: 75, 1: 143, 2: 2}) == 2
    assert launch.find_culprit({0: 143, 1: 75}) == 1


def dist(*words: str) -> subprocess.CompletedProcess[str]:
    """Run dist.sh with this Python."""
    folder = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(folder.parent),
    }
    command = [str(ROOT / "dist.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_one_process_is_the_script_itself(tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(2)")
    done = dist(str(script), "--name", "a  b*", "--device", "cpu")
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == "['--name', 'a  b*', '--device', 'cpu']\n"


def test_two_processes_meet_and_the_failing_ones_message_and_code_come_through(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from utils.distributed import sum_over_ranks, world\n"
        "import torch\n"
        "with world('cpu') as current:\n"
        "    total = sum_over_ranks(torch.ones(1))\n"
        "    if current.is_main:\n"
        "        print(total.item(), flush=True)\n"
        "        time.sleep(60)\n"
        "    print('error: a bad thing', file=sys.stderr, flush=True)\n"
        "    os._exit(2)\n"
    )
    done = dist(str(script), "--device", "cpu", "--nproc", "2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "2.0\n", "error: a bad thing\n")


# Bundled pictures


def test_tiny_training_and_validation_pictures_share_no_pixel() -> None:
    crops: dict[str, set[tuple[str, int, int]]] = {"train": set(), "valid": set()}
    for path in (ROOT / "datasets/tiny").glob("*/*.png"):
        match = re.fullmatch(r"(\w+)_x(\d+)_y(\d+)", path.stem)
        assert match is not None, path.name
        photograph, x, y = match.groups()
        crops[path.parent.name].add((photograph, int(x), int(y)))
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("RGB", (256, 256))
    for photograph, x, y in crops["train"]:
        for other, u, v in crops["valid"]:
            assert photograph != other or abs(x - u) >= 256 or abs(y - v) >= 256
    assert "chelsea" not in {photograph for photograph, _, _ in crops["train"] | crops["valid"]}


def test_bundled_pictures_have_licence_notes() -> None:
    for folder in ("examples", "datasets/tiny"):
        note = (ROOT / folder / "LICENSE.md").read_text()
        for path in (ROOT / folder).rglob("*.png"):
            assert f"`{path.name}`" in note or f"`{path.name.split('_')[0]}`" in note
