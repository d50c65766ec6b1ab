"""What super-resolving an image costs, as a function of which upsampler each pixel gets.

Axes: B patches of *one* image (or the image), M upsamplers, K = M - 1, H W output, S strips.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK_PX = 2**17
# On other devices there is no cache to fit, and starting a chunk costs as much as a million pixels.
_DEVICE_CHUNK_PX = 2**24


@dataclass(frozen=True)
class UpsamplingCost:
    """Cost of an image, or of each of its patches; in FLOPs, or whatever is measured.

    Engines work strip by strip, and for each upsampler that occurs in a strip there is something
    to do once (see `models.fast`). So the cost is `fixed`, plus `pixel` for each pixel, plus
    `strip` for each upsampler in each strip where it occurs.

    Attributes:
        fixed: whatever the classes are.
        pixel: (M,) per output pixel, by its class.
        strip_starts: (S,) first output row of each strip, ascending from 0.
        strip: (S, M).
    """

    fixed: float
    pixel: tuple[float, ...]
    strip_starts: tuple[int, ...]
    strip: NDArray[np.float64]

    def total(self, counts_BHM: NDArray[np.int64]) -> float:
        """Cost of an image; `counts_BHM` are its pixels by patch, row and class."""
        occurs_BSM = self.occurs(counts_BHM)
        pixels_M = counts_BHM.sum(axis=(0, 1))
        fixed = len(counts_BHM) * self.fixed
        return float(fixed + pixels_M @ np.array(self.pixel) + (occurs_BSM * self.strip).sum())

    def occurs(self, counts_BHM: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which classes occur in which strips: (B, S, M)."""
        return np.add.reduceat(counts_BHM, self.strip_starts, axis=1) > 0

    def uniform(self, upsampler: int, size: tuple[int, int], patches: int = 1) -> float:
        """Cost where all pixels have one upsampler; negative indices count from the heaviest.

        Args:
            size: (H, W) of the image, or of its patches.
        """
        pixels = size[0] * size[1] * self.pixel[upsampler]
        return float(patches * (self.fixed + pixels + self.strip[:, upsampler].sum()))


@dataclass(frozen=True)
class ImageCost:
    """Cost of an image that is worked on whole, or in patches of one size.

    Attributes:
        cost: of the image, or of each patch.
        patches: how many; 1 for an image that is worked on whole.
        lr_size, size: (h, w) and (H, W) of the image, or of a patch.
    """

    cost: UpsamplingCost
    patches: int
    lr_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """Output pixels, those of overlaps once per patch."""
        return self.patches * self.size[0] * self.size[1]

    def uniform(self, upsampler: int) -> float:
        """Cost of all patches; see :meth:`UpsamplingCost.uniform`."""
        return self.cost.uniform(upsampler, self.size, self.patches)


def count_rows(classes_BHW: Tensor, upsamplers: int) -> NDArray[np.int64]:
    """Pixels by patch, row and class: (B, H, M)."""
    maps_BKHW = classes_BHW[:, None].float().expand(-1, upsamplers - 1, -1, -1)
    return count_rows_above(maps_BKHW, [j - 0.5 for j in range(1, upsamplers)])


def count_rows_above(maps_BKHW: Tensor, thresholds_K: Sequence[float]) -> NDArray[np.int64]:
    """:func:`count_rows` where a pixel's class is the number of its maps above their threshold.

    Args:
        maps_BKHW: float; a map exceeds its threshold only where those before it do.
    """
    patches, _, H, W = maps_BKHW.shape
    # Comparing into floats and summing these is three times as fast as counting booleans.
    chunks = row_chunks(maps_BKHW)
    buffer = torch.empty_like(maps_BKHW[:, 0, chunks[0]])
    above = []
    for rows in chunks:
        maps = maps_BKHW[:, :, rows].unbind(1)
        is_above = buffer[:, : maps[0].shape[1]]
        counts = [
            torch.gt(each, threshold, out=is_above).sum(dim=-1)
            for each, threshold in zip(maps, thresholds_K, strict=True)
        ]
        above.append(torch.stack(counts, dim=-1))
    reached_BHK = torch.cat(above, dim=1).cpu().numpy().astype(np.int64)
    all_BH1, none_BH1 = np.full((patches, H, 1), W), np.zeros((patches, H, 1), np.int64)
    return -np.diff(np.concatenate([all_BH1, reached_BHK, none_BH1], axis=-1), axis=-1)


def row_chunks(maps_BKHW: Tensor) -> list[slice]:
    """Slices of rows that hold so many pixels, over all patches, that temporaries stay in cache."""
    patches, _, H, W = maps_BKHW.shape
    chunk_px = _CHUNK_PX if maps_BKHW.device.type == "cpu" else _DEVICE_CHUNK_PX
    step = max(1, chunk_px // (patches * W))
    return [slice(first, first + step) for first in range(0, H, step)]
