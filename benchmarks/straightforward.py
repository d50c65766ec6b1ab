"""What training is compared with: samples one by one, and upsamplers pixel by pixel.

Plain code, as one would write it first and as the published loop has it: nothing is kept from one
sample to the next, and every output pixel carries its coordinates. (The published resize goes row
by row in Python and takes longer than this one.)

Axes: B batch, C channels, h w LR, H W output, Q output pixels.
"""

import functools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models.grid import PixelGrid
from models.pcsr import PCSR
from models.sampler import LIIFSampler

SCALE = 4


class StraightforwardSamples(Dataset):
    """Sub-images that are one HR crop each.

    Args:
        paths: image files of (s h, s w) pixels.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``lr`` (3, h, w), ``coord`` and ``cell`` (Q, 2), ``rgb`` (Q, 3); ``hr`` (3, H, W)."""
        with Image.open(self.paths[index]) as image:
            samples = np.asarray(image.convert("RGB"))
        hr = torch.from_numpy(samples.copy()).permute(2, 0, 1).float() / 255
        if random.random() < 0.5:
            hr = hr.flip(-1)
        if random.random() < 0.5:
            hr = hr.flip(-2)
        if random.random() < 0.5:
            hr = hr.transpose(-2, -1)
        lr = _resized(_resized(hr, -2), -1)
        height, width = hr.shape[-2:]
        coord = _coordinates(height, width)
        cell = torch.ones_like(coord)
        cell[:, 0] *= 2 / height
        cell[:, 1] *= 2 / width
        rgb = hr.reshape(3, -1).permute(1, 0)
        order = torch.randperm(len(coord))
        return {
            "lr": lr,
            "coord": coord[order],
            "cell": cell[order],
            "rgb": rgb[order],
            "hr": hr.contiguous(),
        }


def straightforward_batches(paths: Sequence[Path], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches without end, made in this process."""
    samples = StraightforwardSamples(list(paths) * batch_size)
    while True:
        yield from DataLoader(samples, batch_size, shuffle=True, drop_last=True)


def _coordinates(height: int, width: int) -> Tensor:
    """(Q, 2) centres of the pixels in [-1, 1]."""
    rows = (torch.arange(height).float() + 0.5) * 2 / height - 1
    cols = (torch.arange(width).float() + 0.5) * 2 / width - 1
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).reshape(-1, 2)


def _resized(image: Tensor, dim: int) -> Tensor:
    """One axis of MATLAB's antialiased bicubic: a quarter of the length."""
    length = image.shape[dim]
    count = math.ceil(length / SCALE)
    centre = (torch.arange(count) + 0.5) * SCALE - 0.5
    first = torch.floor(centre - 2 * SCALE) + 1
    taps = first[:, None] + torch.arange(4 * SCALE)
    x = ((centre[:, None] - taps) / SCALE).abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x <= 1, near, torch.where(x <= 2, far, torch.zeros(())))
    weights = weights / weights.sum(dim=1, keepdim=True)
    mirrored = torch.cat([torch.arange(length), torch.arange(length).flip(0)])
    indices = mirrored[taps.long() % (2 * length)]
    if dim == -2:
        return torch.einsum("nt,cntw->cnw", weights, image[:, indices])
    return torch.einsum("nt,chnt->chn", weights, image[:, :, indices])


def use_reference(model: nn.Module) -> nn.Module:
    """Let every upsampler and classifier of `model` work pixel by pixel. Returns `model`."""
    for module in model.modules():
        if isinstance(module, PCSR):
            module.uses_kernels = False
        if isinstance(module, LIIFSampler):
            module.dense = functools.partial(_pixel_by_pixel, module)  # type: ignore[method-assign]
    return model


def _pixel_by_pixel(sampler: LIIFSampler, feat_BChw: Tensor, grid: PixelGrid) -> Tensor:
    """(B, outputs, H, W), as `LIIFSampler.dense`."""
    return sampler(feat_BChw, grid).transpose(1, 2).unflatten(2, grid.out_size)
