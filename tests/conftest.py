"""Fixtures that several test files share."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

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
