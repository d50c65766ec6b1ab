"""The two resize modes: bit-exact benchmark LR images, and the geometry of MATLAB's imresize."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.resize import imresize, imresize_crops, imresize_uint8
from utils.images import list_images, read_rgb

RNG = np.random.default_rng(0)


@pytest.mark.golden
@pytest.mark.parametrize(("name", "count"), [("Set5", 5), ("Set14", 14), ("BSD100", 100)])
def test_uint8_mode_equals_the_benchmark_images(shared: Path, name: str, count: int) -> None:
    folder = shared / "data" / "test" / name
    hr_paths = list_images(folder / "HR")
    assert len(hr_paths) == count
    for path in hr_paths:
        hr = read_rgb(path)
        hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
        np.testing.assert_array_equal(
            imresize_uint8(hr, 0.25), read_rgb(folder / "LR_x4" / path.name), err_msg=path.name
        )


@pytest.mark.golden
def test_float_mode_equals_the_published_resize(shared: Path) -> None:
    with np.load(shared / "published" / "butterfly_crop.npz") as golden:
        hr = torch.from_numpy(golden["hr_uint8"]).permute(2, 0, 1).float() / 255
        expected = torch.from_numpy(golden["lr"])
    assert (imresize(hr, 0.25) - expected).abs().max() * 255 < 2e-4
    by_products = imresize_crops(hr[None], (expected.shape[-2], expected.shape[-1]))[0]
    assert (by_products - expected).abs().max() * 255 < 2e-4


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_float_mode_equals_torch_on_a_mirrored_image(factor: int) -> None:
    image = torch.from_numpy(RNG.random((1, 3, 12 * factor, 7 * factor), dtype=np.float32))
    pad = 4 * factor
    mirrored = torch.from_numpy(
        np.pad(image.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)], mode="symmetric")
    )
    expected = F.interpolate(mirrored, scale_factor=1 / factor, mode="bicubic", antialias=True)
    expected = expected[..., 4:-4, 4:-4]
    torch.testing.assert_close(imresize(image, 1 / factor), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(imresize(image, size=(12, 7)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sides", [(128, 32), (70, 32), (33, 32), (6, 2), (3, 1)])
def test_products_resize_crops_alone_as_in_a_batch(sides: tuple[int, int]) -> None:
    side, lr_side = sides
    crops = torch.from_numpy(RNG.random((5, 3, side, side), dtype=np.float32))
    resized = imresize_crops(crops, (lr_side, lr_side))
    expected = imresize(crops, size=(lr_side, lr_side))
    torch.testing.assert_close(resized, expected, atol=1e-6, rtol=0)
    alone = [imresize_crops(crop[None], (lr_side, lr_side))[0] for crop in crops]
    assert torch.equal(resized, torch.stack(alone))


def test_enlarging_interpolates_with_the_keys_kernel() -> None:
    image = torch.from_numpy(RNG.random((3, 9, 8), dtype=np.float32))
    inner = F.interpolate(image[None], scale_factor=3, mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(imresize(image, 3)[:, 6:-6, 6:-6], inner[:, 6:-6, 6:-6])
    torch.testing.assert_close(imresize(image, 1), image, atol=0, rtol=0)


def test_a_given_scale_is_kept_and_a_given_size_sets_it() -> None:
    ramp = torch.arange(100, dtype=torch.float64).expand(1, 1, 100)
    by_scale = imresize(ramp, 1 / 2.7)[0, 0]
    assert len(by_scale) == 38
    positions = (torch.arange(38) + 0.5) * 2.7 - 0.5
    torch.testing.assert_close(by_scale[3:-3], positions[3:-3].double(), atol=0.02, rtol=0)
    by_size = imresize(ramp, size=(1, 38))[0, 0]
    positions = (torch.arange(38) + 0.5) * 100 / 38 - 0.5
    torch.testing.assert_close(by_size[3:-3], positions[3:-3].double(), atol=0.02, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 1), (3, 2)])
@pytest.mark.parametrize("scale", [0.25, 1 / 2.7, 2.7])
def test_tiny_constant_images_stay_constant(height: int, width: int, scale: float) -> None:
    image = torch.full((2, 3, height, width), 0.3)
    resized = imresize(image, scale)
    assert resized.shape == (2, 3, -(-height * scale // 1), -(-width * scale // 1))
    torch.testing.assert_close(resized, torch.full_like(resized, 0.3))
    rgb = np.full((height, width, 3), 77, np.uint8)
    assert set(imresize_uint8(rgb, scale).ravel()) == {77}


def test_float_mode_is_not_clamped() -> None:
    image = torch.zeros(3, 32, 32)
    image[:, :, 16:] = 1
    assert imresize(image, 0.25).min() < -0.01
    assert imresize(image, 0.25).max() > 1.01


def test_nonsense_is_refused() -> None:
    image = torch.zeros(3, 8, 8)
    for arguments in ({}, {"scale": 0}, {"scale": float("nan")}, {"size": (0, 4)}):
        with pytest.raises(ValueError, match=r"scale|size"):
            imresize(image, **arguments)  # type: ignore[arg-type]


def test_rounding_of_a_product_makes_no_pixel_more() -> None:
    assert 50 * 1.1 > 55
    assert imresize_uint8(np.zeros((50, 90, 3), np.uint8), 1.1).shape == (55, 99, 3)
