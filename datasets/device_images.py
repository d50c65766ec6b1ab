"""All pixels of many images in one tensor on a device, and crops of them, any side up."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.cache import OnDamaged, in_threads
from utils.errors import UserError
from utils.images import read_rgb, read_size

_log = logging.getLogger(__name__)

CHANNELS = 3
# Of a crop: where its first pixel is, and how far apart neighbours in channel, row and column are.
PLAN_WIDTH = 4


def image_sizes(paths: Sequence[Path], on_damaged: OnDamaged) -> np.ndarray:
    """(n, 2) int64 heights and widths, from the files' headers; 0 where one cannot be read."""
    sizes = np.zeros((len(paths), 2), np.int64)

    def measure(index: int) -> UserError | None:
        try:
            sizes[index] = read_size(paths[index])
        except UserError as error:
            return error
        return None

    _report(measure, len(paths), "sizes", on_damaged)
    return sizes


@dataclass(frozen=True)
class DeviceImages:
    """Decoded images.

    Attributes:
        pixels: (N,) uint8 RGB samples on the device; each image is (3, H, W).
        starts: (n,) int64, where each image begins.
        heights, widths: (n,) int64.
    """

    pixels: Tensor
    starts: np.ndarray
    heights: np.ndarray
    widths: np.ndarray

    @classmethod
    def load(
        cls, paths: Sequence[Path], sizes: np.ndarray, device: torch.device, on_damaged: OnDamaged
    ) -> "DeviceImages":
        """Decode images of these sizes, in threads; those of height 0 are left out."""
        heights, widths = sizes.T
        ends = np.cumsum(CHANNELS * heights * widths)
        starts = np.concatenate([[0], ends[:-1]])
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8, device=device)

        def fill(index: int) -> UserError | None:
            """Decode one image to its place; returns what is wrong with it."""
            if heights[index] == 0:
                return None
            try:
                rgb = read_rgb(paths[index])
            except UserError as error:
                return error
            if rgb.shape[:2] != (heights[index], widths[index]):
                return UserError(f"image {paths[index]} has another size than its header says")
            planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
            pixels[starts[index] : ends[index]].copy_(torch.from_numpy(planes).flatten())
            return None

        failed = _report(fill, len(paths), "decoding", on_damaged)
        decoded = np.count_nonzero(heights) - failed
        _log.info("%d images decoded, %.0f MiB on %s", decoded, ends[-1] / 2**20, device)
        return cls(pixels, starts, heights, widths)

    def plan(
        self,
        images: np.ndarray,
        top: np.ndarray,
        left: np.ndarray,
        side: np.ndarray,
        flips: np.ndarray,
    ) -> np.ndarray:
        """Where the pixels of square crops are: an orientation is a first pixel and two steps.

        Args:
            images, top, left, side: (n,) int64 each.
            flips: (n, 3) bool: left to right, then top to bottom, then transposed.

        Returns:
            (n, 4) int64.
        """
        row, col = self.widths[images], np.ones_like(images)
        start = self.starts[images] + top * row + left
        plane = self.heights[images] * row
        mirrored, upside_down, transposed = flips.T
        start = start + np.where(mirrored, side - 1, 0) + np.where(upside_down, side - 1, 0) * row
        col = np.where(mirrored, -col, col)
        row = np.where(upside_down, -row, row)
        row, col = np.where(transposed, col, row), np.where(transposed, row, col)
        return np.stack([start, plane, row, col], axis=1)

    def crops(self, plan_B4: Tensor, side: int) -> Tensor:
        """The crops of a plan, which is on the images' device: (B, 3, side, side) in [0, 1]."""
        gather = _copy_views if self.pixels.device.type == "cpu" else gather_indices
        return gather(self.pixels, plan_B4, side).float().div_(255)


def gather_indices(pixels: Tensor, plan_B4: Tensor, side: int) -> Tensor:
    """Samples of crops by the index of each, in one piece of work: (B, 3, side, side) uint8."""
    start, plane, row, col = (value[:, None, None, None] for value in plan_B4.unbind(1))
    steps = torch.arange(side, device=pixels.device)
    channels = torch.arange(CHANNELS, device=pixels.device)[:, None, None]
    return pixels[(start + plane * channels) + (row * steps[:, None] + col * steps)]


def _copy_views(pixels: Tensor, plan_B4: Tensor, side: int) -> Tensor:
    """As `gather_indices`, crop by crop, which takes a CPU a tenth of the time."""
    crops = np.empty((len(plan_B4), CHANNELS, side, side), np.uint8)
    source = pixels.numpy()
    for target, (start, *steps) in zip(crops, plan_B4.tolist(), strict=True):
        # NumPy's views, unlike torch's, may have steps below zero.
        target[...] = np.ndarray(target.shape, np.uint8, source, start, steps)
    return torch.from_numpy(crops)


def _report(
    job: Callable[[int], UserError | None], count: int, description: str, on_damaged: OnDamaged
) -> int:
    """Run `job` on each index, tell `on_damaged` of the errors that it returns, and count them."""
    failed = 0
    with contextlib.closing(in_threads(job, count, description)) as errors:
        for index, error in enumerate(errors):
            if error is not None:
                on_damaged(index, error)
                failed += 1
    return failed
