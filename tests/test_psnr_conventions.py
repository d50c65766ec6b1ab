"""PSNR by other conventions than the table's."""

import math

import numpy as np
import pytest
import torch
from skimage.data import astronaut
from torch import Tensor

from engine.report import psnr_table
from utils.metrics import psnr
from utils.psnr_conventions import NAMES, mean_psnrs, psnrs


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, np.ndarray]:
    """(prediction, HR) of more rows than are worked on at once, with values outside [0, 1]."""
    hr = np.vstack([astronaut()[:, 100:150], astronaut()[:60, 100:150]])
    noise = torch.randn(3, *hr.shape[:2], generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(hr).permute(2, 0, 1) / 255 + 0.03 * noise, hr


def test_the_tables_own_figures_are_among_them(pair) -> None:
    sr, hr = pair
    found = psnrs(sr, hr, 4)
    assert tuple(found) == NAMES
    for psnr_type in ("rgb", "y"):
        for border in (0, 4, 10):
            expected = psnr(sr, hr, psnr_type=psnr_type, border_px=border)
            assert found[psnr_type][border] == pytest.approx(expected, abs=1e-9)


def test_unrounded_figures_are_those_of_unrounded_images(pair) -> None:
    sr, hr = pair
    inner = np.s_[4:-4, 4:-4]
    exact = sr.clamp(0, 1).double().permute(1, 2, 0).numpy()[inner] * 255
    rounded, true = np.rint(exact), hr[inner].astype(float)
    limited = np.array([65.481, 128.553, 24.966]) / 255
    full = np.array([0.299, 0.587, 0.114])
    found = {name: row[4] for name, row in psnrs(sr, hr, 4).items()}

    def decibels(difference: np.ndarray) -> float:
        return 10 * math.log10(255**2 / np.square(difference).mean())

    assert found["rgb not rounded"] == pytest.approx(decibels(exact - true), abs=1e-6)
    assert found["y not rounded"] == pytest.approx(decibels((rounded - true) @ limited), abs=1e-9)
    assert found["y full range"] == pytest.approx(decibels((rounded - true) @ full), abs=1e-9)
    gain = found["y not rounded"] - found["y full range"]
    assert gain == pytest.approx(20 * math.log10(255 / 219), abs=0.01)


def test_a_mean_over_channels_is_of_their_psnrs() -> None:
    hr = np.full((12, 10, 3), 100, np.uint8)
    sr = torch.from_numpy(hr + np.array([1, 2, 4], np.uint8)).permute(2, 0, 1) / 255
    of_one = 20 * math.log10(255)
    mean = of_one - 20 * math.log10(2)
    assert psnrs(sr, hr, 2)["mean of r, g, b"][2] == pytest.approx(mean, abs=1e-9)
    assert psnrs(sr, hr, 2)["rgb"][2] == pytest.approx(of_one - 10 * math.log10(7), abs=1e-9)


def test_equal_images_and_images_within_the_border() -> None:
    hr = np.full((9, 30, 3), 128, np.uint8)
    found = psnrs(torch.full((3, 9, 30), 128 / 255), hr, 4)
    assert found["rgb"][4] == found["y"][0] == math.inf
    assert all(math.isnan(row[10]) for row in found.values())
    lines = psnr_table({"bicubic": None, "network": found}).splitlines()
    assert lines[0].endswith("  border  0  border  4  border 10")
    assert [line.split() for line in lines[1:3]] == [["network"], ["rgb", "inf", "inf", "-"]]
    assert len({len(line) for line in [lines[0], *lines[2:8]]}) == 1


def test_means_are_over_images() -> None:
    images = [{name: {0: value, 4: 2 * value} for name in NAMES} for value in (20.0, 30.0)]
    assert mean_psnrs(images) == {name: {0: 25.0, 4: 50.0} for name in NAMES}
