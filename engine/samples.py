"""HR images with the LR images to evaluate on.

Axes: h w LR, H W HR.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

import datasets
from datasets.folders import ImageFolder, PairedImageFolders, pair_by_name
from datasets.wrappers import crop_to_scale, downsample
from engine.conventions import Conventions
from engine.memory import memory_named
from utils.config import DataConfig
from utils.errors import UserError
from utils.images import list_images, read_rgb, read_size, to_tensor


@dataclass(frozen=True)
class ImagePaths:
    """Where the images are, sorted by name.

    Attributes:
        hr: HR images, at least one.
        lr: the LR image of each; None where LR is to be made.
    """

    hr: list[Path]
    lr: list[Path] | None = None

    @classmethod
    def of_folders(cls, hr_dir: str | Path, lr_dir: str | Path | None = None) -> "ImagePaths":
        """The images of a folder, and those of another that are paired with them by name.

        Raises:
            UserError: no such folder, no images, or files without a partner.
        """
        hr_paths = list_images(Path(hr_dir).expanduser())
        if lr_dir is None:
            return cls(hr_paths)
        pairs = pair_by_name(hr_paths, list_images(Path(lr_dir).expanduser()))
        return cls(hr_paths, [lr for _, lr in pairs])

    @classmethod
    def of_config(cls, data: DataConfig) -> "ImagePaths":
        """The images of a config's `test_dataset`; errors as those of its data set."""
        args = {**(data.dataset.get("args") or {}), "cache": "none"}
        dataset = datasets.make({**data.dataset, "args": args}, "test_dataset.dataset")
        if isinstance(dataset, PairedImageFolders):
            return cls(dataset.hr_paths, dataset.lr_paths)
        if isinstance(dataset, ImageFolder):
            return cls(dataset.paths)
        raise UserError("config: `test_dataset.dataset` is no image folder: use --hr_data")


@dataclass(frozen=True)
class EvaluationSample:
    """One image.

    Attributes:
        name: file name of the HR image.
        lr: (3, h, w) float32 RGB, nominally in [0, 1].
        hr: (H, W, 3) uint8, H = round(h * scale).
    """

    name: str
    lr: Tensor
    hr: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return (self.hr.shape[0], self.hr.shape[1])


class EvaluationSet:
    """Images to evaluate on: HR read as 8-bit RGB, LR made from it or read.

    HR is cropped from the top left to what the scale divides (for any real scale,
    h = floor(H / scale)), then LR and HR to what patches tile where the conventions say so.
    Headers are read and pairs are compared at once, so that a wrong folder shows up before any
    computing.

    Args:
        paths: where they are.
        conventions: how they are prepared.

    Attributes:
        hr_pixels: of each HR file.

    Raises:
        UserError: a file that is no image, sizes that do not differ by the scale, or images too
            small for it. On access: damaged pixels.
    """

    def __init__(self, paths: ImagePaths, conventions: Conventions) -> None:
        self.conventions = conventions
        self.hr_paths = paths.hr
        self.lr_paths = paths.lr
        sizes, problems = [], {}
        for index, path in enumerate(self.hr_paths):
            try:
                sizes.append(self._checked_size(index))
            except UserError as error:
                problems[path.name] = str(error)
        if problems:
            _, *others = problems
            more = f"; nor will do {', '.join(others)}" if others else ""
            raise UserError(f"{next(iter(problems.values()))}{more}")
        self.hr_pixels = [math.prod(size) for size in sizes]

    @property
    def names(self) -> list[str]:
        """The HR file names, in order."""
        return [path.name for path in self.hr_paths]

    def __len__(self) -> int:
        return len(self.hr_paths)

    def __getitem__(self, index: int) -> EvaluationSample:
        path = self.hr_paths[index]
        with memory_named(f"image {path}: not enough memory to read it and to make its LR"):
            return self._sample(index, path)

    def _sample(self, index: int, path: Path) -> EvaluationSample:
        hr, size = crop_to_scale(read_rgb(path), self.conventions.scale, path)
        if self.lr_paths is None:
            lr = downsample(
                hr, size, "uint8" if self.conventions.lr == "bicubic uint8" else "float"
            )
        else:
            lr = to_tensor(read_rgb(self.lr_paths[index]))
        h, w = (min(a, b) for a, b in zip(size, lr.shape[-2:], strict=True))
        h, w = (self._used(length) for length in (h, w))
        height, width = (round(length * self.conventions.scale) for length in (h, w))
        return EvaluationSample(path.name, lr[:, :h, :w].contiguous(), hr[:height, :width])

    def _used(self, length: int) -> int:
        """Of an LR length, with `crop` the most that patches tile; less than a patch stays."""
        if not self.conventions.crop:
            return length
        patch_size, step = self.conventions.patch_size, self.conventions.step
        return length if length < patch_size else (length - patch_size) // step * step + patch_size

    def _checked_size(self, index: int) -> tuple[int, int]:
        """(H, W) of an HR file, which suits the scale and its LR file."""
        path, scale = self.hr_paths[index], self.conventions.scale
        hr_size = read_size(path)
        # What is left of it: see `crop_to_scale`.
        used = round(self._used(math.floor(min(hr_size) / scale + 1e-6)) * scale)
        if used <= 2 * self.conventions.border_px:
            raise UserError(
                f"image {path} is {hr_size[1]}x{hr_size[0]}, too small for scale {scale:g}: "
                f"nothing is left inside a border of {self.conventions.border_px} px"
            )
        if self.lr_paths is None:
            return hr_size
        lr_size = read_size(self.lr_paths[index])
        # An HR size that the scale does not divide may have been rounded down or up to LR.
        if any(abs(hr - scale * lr) >= scale for hr, lr in zip(hr_size, lr_size, strict=True)):
            raise UserError(
                f"HR/LR mismatch: {path.name} is {hr_size[1]}x{hr_size[0]}, its LR "
                f"{self.lr_paths[index].name} {lr_size[1]}x{lr_size[0]}: "
                f"they do not differ by scale {scale:g}"
            )
        return hr_size
