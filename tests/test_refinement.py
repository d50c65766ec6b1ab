"""Pixel-wise refinement."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.refinement import refine


def test_pixels_below_a_heavier_class_become_the_mean() -> None:
    """Three classes, pixel by pixel against the definition."""
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(2, 3, 6, 7, generator=generator)
    classes = torch.randint(0, 3, (2, 6, 7), generator=generator, dtype=torch.uint8)
    expected = prediction.clone()
    for b in range(2):
        for y in range(1, 5):
            for x in range(1, 6):
                near = (b, slice(y - 1, y + 2), slice(x - 1, x + 2))
                if classes[near].max() > classes[b, y, x]:
                    expected[b, :, y, x] = prediction[b, :, *near[1:]].mean(dim=(1, 2))
    before = prediction.clone()
    torch.testing.assert_close(refine(prediction, classes), expected)
    assert torch.equal(prediction, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 3)])
def test_outermost_pixels_stay(size: tuple[int, int]) -> None:
    prediction = torch.rand(1, 3, *size)
    classes = torch.ones(1, *size, dtype=torch.uint8)
    classes[:, 0, 0] = 0
    assert torch.equal(refine(prediction, classes), prediction)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["k0", "k1", "adaptive"])
def test_golden_pictures(shared: Path, name: str) -> None:
    golden = np.load(shared / "published" / "butterfly_crop.npz")
    prediction, classes, expected = (
        torch.from_numpy(golden[key])[None]
        for key in (f"{name}_no_refinement", f"{name}_class", name)
    )
    torch.testing.assert_close(refine(prediction, classes), expected, rtol=0, atol=1e-6)
