"""PSNR and SSIM: the named conventions, and the inputs on which metrics usually break."""

import math

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from utils.errors import UserError
from utils.metrics import json_number, luma, psnr, quantise, ssim


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """(HR, noisy), a photograph of more rows than one strip of the SSIM."""
    hr = np.vstack([astronaut()[:, 100:180], astronaut()[:50, 100:180]])
    noise = np.random.default_rng(0).normal(0, 8, hr.shape)
    return hr, (hr + noise).clip(0, 255).astype(np.uint8)


def test_quantise_clamps_and_rounds() -> None:
    image = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 1.3])[None, None].expand(3, 1, 4)
    assert quantise(image)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_psnr_of_a_known_error() -> None:
    hr = np.full((12, 10, 3), 100, np.uint8)
    sr = hr.copy()
    sr[4:-4, 4:-4, 0] += 3  # one channel of three: mean square error 3
    sr[0] = 0  # border only
    expected = 10 * math.log10(255**2 / 3)
    assert psnr(sr, hr, psnr_type="rgb", border_px=4) == pytest.approx(expected, abs=1e-9)
    assert psnr(sr, hr, psnr_type="rgb", border_px=0) < expected


def test_luma_is_limited_range() -> None:
    colours = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert luma(np.array([colours], np.uint8)).tolist() == [[16, 235, 81, 145, 41]]


def test_grey_noise_gains_the_limited_range_on_y() -> None:
    hr = np.full((64, 64, 3), 128, np.uint8)
    sr = (hr + np.random.default_rng(0).integers(-40, 40, (64, 64, 1))).astype(np.uint8)
    gain = psnr(sr, hr, psnr_type="y", border_px=0) - psnr(sr, hr, psnr_type="rgb", border_px=0)
    assert gain == pytest.approx(20 * math.log10(255 / 219), abs=0.02)


@pytest.mark.parametrize("psnr_type", ["rgb", "y"])
def test_identical_images(pair, psnr_type) -> None:
    hr, _ = pair
    assert psnr(hr, hr, psnr_type=psnr_type, border_px=4) == math.inf
    assert ssim(hr, hr, psnr_type=psnr_type, border_px=4) == pytest.approx(1)


def test_ssim_in_strips_is_the_ssim_of_the_whole(pair) -> None:
    hr, sr = pair
    whole = structural_similarity(
        hr[4:-4, 4:-4],
        sr[4:-4, 4:-4],
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2,
    )
    assert ssim(sr, hr, psnr_type="rgb", border_px=4) == pytest.approx(whole, abs=1e-12)


def test_ssim_needs_a_window() -> None:
    image = np.zeros((10, 40, 3), np.uint8)
    assert math.isnan(ssim(image, image, psnr_type="y", border_px=0))


def test_tensors_and_arrays_agree_and_stay_unchanged(pair) -> None:
    hr, sr = pair
    sr_3HW = torch.from_numpy(sr).permute(2, 0, 1).float() / 255
    before = (hr.copy(), sr.copy(), sr_3HW.clone())
    for metric in (psnr, ssim):
        from_array = metric(sr, hr, psnr_type="y", border_px=4)
        assert metric(sr_3HW, hr, psnr_type="y", border_px=4) == from_array
    assert (hr == before[0]).all()
    assert (sr == before[1]).all()
    assert torch.equal(sr_3HW, before[2])


def test_bad_input_is_named() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="8x7"):
        psnr(image[:7], image, psnr_type="rgb", border_px=0)
    with pytest.raises(UserError, match="border of 4"):
        psnr(image, image, psnr_type="rgb", border_px=4)
    with pytest.raises(UserError, match="choose one of rgb, y"):
        psnr(image, image, psnr_type="Y", border_px=0)  # type: ignore[arg-type]


def test_json_has_no_infinity() -> None:
    assert [json_number(value) for value in (1.5, math.inf, math.nan)] == [1.5, None, None]


def test_luma_is_that_of_scikit_image() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8)
    assert np.array_equal(luma(rgb), np.rint(rgb2ycbcr(rgb)[..., 0]))
