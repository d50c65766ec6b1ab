"""Fixtures that several test files share."""

import os
from pathlib import Path

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
