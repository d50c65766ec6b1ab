"""Whole batches of random samples at once, made on the device that holds all images.

The samples are those of the wrappers in `datasets.wrappers`, asked for one by one with the same
`SampleKey`: on a CPU to the bit, elsewhere up to the rounding of the resize.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.device_images import CHANNELS, DeviceImages, image_sizes
from datasets.draws import draw
from datasets.folders import ImageFolder, PairedImageFolders
from datasets.pairing import common_size
from datasets.resize import imresize_crops
from datasets.sampling import IterationBatchSampler, SampleKey
from datasets.wrappers import FLIPS, SRImplicitDownsampled, SRImplicitPaired
from utils.errors import UserError
from utils.machine import free_memory_bytes

_log = logging.getLogger(__name__)

Samples = SRImplicitDownsampled | SRImplicitPaired

# So many samples' random numbers are drawn at once: a microsecond each instead of ten.
_DRAWN_AT_ONCE = 2048


class NotOnDevice(Exception):  # noqa: N818  (no error: the caller goes on with another cache)
    """Batches of this data set cannot be made on the device.

    Attributes:
        instead: the cache to use.
    """

    def __init__(self, reason: str, instead: str = "in_memory") -> None:
        super().__init__(reason)
        self.instead = instead


class _Layer(NamedTuple):
    """Images of one kind, and how many of their pixels go on one pixel of the drawn crop."""

    images: DeviceImages
    factor: int


class DeviceBatches:
    """Makes the batches of a training run.

    Args:
        samples: their data set is decoded here.
        device: where the images are kept and the batches are made.
        processes: how many on this machine have images of their own: each its GPU's memory for
            them, all of them the host's.

    Raises:
        NotOnDevice: the images do not fit, or are not cropped to one size; known from their
            headers, so that no pixels are held while another cache decodes them.
        UserError: an image that is damaged (unless those are skipped) or too small.
    """

    def __init__(self, samples: Samples, device: torch.device, processes: int = 1) -> None:
        if samples.inp_size is None:
            raise NotOnDevice("without `inp_size` samples are whole images of many sizes")
        if isinstance(samples, SRImplicitDownsampled) and samples.lr_mode != "float":
            raise NotOnDevice("`lr_mode: uint8` makes LR images one by one")
        dataset = samples.dataset
        sizes = [image_sizes(column, dataset.note_damaged) for column in dataset.columns]
        _check_memory(sizes, dataset.cache_share, device, processes)
        if isinstance(dataset, PairedImageFolders):
            _check_scales(dataset, sizes)
        images = [
            DeviceImages.load(column, size, device, dataset.note_damaged)
            for column, size in zip(dataset.columns, sizes, strict=True)
        ]
        self._samples = samples
        self._side = samples.inp_size
        self._device = device
        # Which images the samples of an epoch are made of, damaged ones replaced.
        self._places = _used_places(dataset)
        if isinstance(dataset, PairedImageFolders):
            scale, self._sizes = _common_sizes(dataset, sizes, self._places)
            self._layers = {"lr": _Layer(images[1], 1), "hr": _Layer(images[0], scale)}
        else:
            self._sizes = sizes[0]
            self._layers = {"hr": _Layer(images[0], 1)}
        self._check_sizes(dataset)
        self._flips = np.array([name in samples.flips for name in FLIPS])

    def batches(self, sampler: IterationBatchSampler) -> Iterator[dict[str, Tensor]]:
        """The batches that `sampler` lists, ``{"lr", "hr"}`` float32 on the device."""
        share = sampler.batch_size // sampler.world_size
        step = max(1, _DRAWN_AT_ONCE // share)
        for first in range(sampler.start, sampler.stop, step):
            yield from self._drawn(sampler, range(first, min(first + step, sampler.stop)))

    def _drawn(
        self, sampler: IterationBatchSampler, iterations: range
    ) -> Iterator[dict[str, Tensor]]:
        positions, indices = sampler.places(iterations)
        images = self._places[indices]
        sides = np.array([self._drawn_side(sampler.seed, each) for each in iterations])
        side = np.repeat(sides, len(images) // len(sides))
        heights, widths = self._sizes[images].T
        draws = draw(sampler.seed, positions, heights - side + 1, widths - side + 1)
        plans = {}
        for name, (pixels, factor) in self._layers.items():
            corner = factor * draws.top, factor * draws.left
            plan = pixels.plan(images, *corner, factor * side, draws.flips & self._flips)
            plans[name] = torch.from_numpy(plan).to(self._device).chunk(len(sides))
        for place, drawn_side in enumerate(sides.tolist()):
            yield self._batch({name: plan[place] for name, plan in plans.items()}, drawn_side)

    def _batch(self, plans: dict[str, Tensor], side: int) -> dict[str, Tensor]:
        batch = {
            name: self._layers[name].images.crops(plan, self._layers[name].factor * side)
            for name, plan in plans.items()
        }
        if "lr" in batch:
            return batch
        return {"lr": imresize_crops(batch["hr"], (self._side, self._side)), **batch}

    def _drawn_side(self, seed: int, iteration: int) -> int:
        """Side of an iteration's crops, in pixels of what they are drawn from."""
        if not isinstance(self._samples, SRImplicitDownsampled):
            return self._side
        bounds = self._samples.lowest_scale, self._samples.highest_scale
        return round(self._side * SampleKey(0, 0, iteration, seed).scale(*bounds))

    def _check_sizes(self, dataset: ImageFolder | PairedImageFolders) -> None:
        largest = self._side
        if isinstance(self._samples, SRImplicitDownsampled):
            largest = round(self._side * self._samples.highest_scale)
        for place in np.unique(self._places):
            height, width = self._sizes[place]
            if min(height, width) < largest:
                kind = "image" if isinstance(dataset, ImageFolder) else "image LR of"
                raise UserError(
                    f"{kind} {dataset.name(place)} is {width}x{height}, too small for a crop of "
                    f"{largest}x{largest}; remove it or reduce inp_size"
                )


def _check_memory(
    sizes: list[np.ndarray], share: float, device: torch.device, processes: int
) -> None:
    needed = sum(CHANNELS * int(size.prod(axis=1).sum()) for size in sizes)

    def sharing(where: torch.device) -> int:
        return processes if where.type == "cpu" else 1

    def fits(where: torch.device) -> bool:
        free = free_memory_bytes(where)
        return free is None or needed * sharing(where) <= share * free

    if not fits(device):
        host = torch.device("cpu")
        instead = "in_memory" if device != host and fits(host) else "none"
        raise NotOnDevice(
            f"the images take {needed / 2**20:.0f} MiB in each of {sharing(device)} processes, "
            f"more than `cache_share` {share:g} of the free memory of {device}",
            instead,
        )


def _check_scales(dataset: PairedImageFolders, sizes: list[np.ndarray]) -> None:
    """That the pairs have one scale, whichever of them turn out to be damaged further on."""
    scales = set()
    for place in np.unique(_used_places(dataset)):
        # A pair without a scale is an error only if its pixels can be read.
        with contextlib.suppress(UserError):
            scales.add(_common_size(dataset, sizes, place)[0])
    if len(scales) > 1:
        raise NotOnDevice(f"pairs have several scales: {sorted(scales)}")


def _common_sizes(
    dataset: PairedImageFolders, sizes: list[np.ndarray], places: np.ndarray
) -> tuple[int, np.ndarray]:
    """The scale of all pairs, and the (n, 2) LR sizes where both images have pixels."""
    lr_sizes = np.zeros_like(sizes[1])
    scale = 1
    for place in np.unique(places):
        scale, lr_sizes[place] = _common_size(dataset, sizes, place)
    return scale, lr_sizes


def _common_size(
    dataset: PairedImageFolders, sizes: list[np.ndarray], place: int
) -> tuple[int, tuple[int, int]]:
    hr_size, lr_size = (tuple(size[place].tolist()) for size in sizes)
    return common_size(hr_size, lr_size, dataset.name(place))


def _used_places(dataset: ImageFolder | PairedImageFolders) -> np.ndarray:
    """The place of every sample of an epoch, (n,); of damaged images, that of the next."""
    return np.array([dataset.place(index) for index in range(len(dataset))])
