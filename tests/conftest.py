"""Fixtures that several test files share."""

import logging
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.demo.cli import main
from engine.demo.words import make_parser
from tests.demo_models import SPECS, Demo, save_model
from tests.training import make_config, make_pictures, run
from utils import cli as command
from utils.images import read_rgb

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # Small tensors gain nothing from more threads, and test processes often run side by side.
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden material: `PCSR_SHARED`, or `shared` beside the repository.

    It holds official weights and benchmark images, which are not ours to distribute.
    """
    folder = Path(os.environ.get("PCSR_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "published").is_dir():
        pytest.skip(f"golden material is absent: no published/ in {folder} (set PCSR_SHARED)")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """With PCSR_REQUIRE_GOLDEN=1, a golden test that is skipped for any reason has failed."""
    report = yield
    required = os.environ.get("PCSR_REQUIRE_GOLDEN") == "1"
    golden = "shared" in getattr(item, "fixturenames", ()) or item.get_closest_marker("golden")
    if required and golden and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"PCSR_REQUIRE_GOLDEN is set, but this test was skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small pictures to train with."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def exact_convolutions() -> Any:
    """On a GPU, PyTorch's convolutions round to tf32 by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
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


@pytest.fixture(autouse=True)
def levels_stay() -> Any:
    """Benchmarks silence what they run; the next test is to hear it again."""
    loggers = [logging.getLogger(), logging.getLogger("engine")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def search_path_stays() -> Any:
    """Scripts run in this process put the repository in the place of the tests' own folder."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def phase0(pictures: Path, tmp_path: Path) -> Any:
    """Trains phase 0 of a kind where its phase 1 looks for it."""

    def prepare(kind: str) -> Path:
        folder = tmp_path / kind.replace("phase1", "phase0")
        if kind.endswith("phase1") and not folder.exists():
            run(make_config(folder.name, pictures, iter_max=1), folder)
        return folder

    return prepare


@pytest.fixture(scope="session")
def demo_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the models in `demo_models.SPECS`, and of one that is bilinear enlargement."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: save_model(folder / f"{name}.pth", spec) for name, spec in SPECS.items()}
    return {**paths, "bilinear": save_model(folder / "b.pth", SPECS["two"], residual=False)}


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """(83, 110, 3) uint8, sides that 4 does not divide."""
    return read_rgb(REPOSITORY / "examples" / "chelsea.png")[100:183, 120:230].copy()


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Demo:
    """Run demo.py's command line in this process; returns the exit code."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["demo.py", "--device", "cpu", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            command.run(lambda: main(make_parser()))
        return int(ended.value.code or 0)

    return call
