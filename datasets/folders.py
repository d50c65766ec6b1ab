"""Folders of images, and pairs of folders, as map-style data sets.

Both give (H, W, 3) uint8 RGB; 16-bit files are rounded, gray ones converted, alpha is dropped.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.cache import open_store
from datasets.registry import DATASETS
from utils.errors import UserError
from utils.images import list_images

# What published data sets append to a name: 0801x4, 0801x4m, baby_LRBI_x4, 0801LRx4, img_001_HR.
_SUFFIX = re.compile(
    r"(?:(?:[_-]?[LH]R(?:BI|BD|DN)?)?[_-]?x\d(?:\.\d+)?[mdw]?|[_-][LH]R(?:BI|BD|DN)?)$",
    re.IGNORECASE,
)
_ORPHANS_SHOWN = 5


@DATASETS.register("image-folder")
class ImageFolder:
    """The images directly inside a folder, sorted by name.

    Args:
        root_path: the folder; not searched recursively.
        first_k: take only the first so many images.
        repeat: count each image so many times per epoch.
        cache: ``none``, ``in_memory`` or ``lmdb``, see `datasets.cache.open_store`.
        cache_dir: where the LMDB goes, if not into the user's cache folder.

    Raises:
        UserError: no such folder, no images, a damaged image, or arguments out of range.
    """

    def __init__(
        self,
        *,
        root_path: str,
        first_k: int | None = None,
        repeat: int = 1,
        cache: str = "none",
        cache_dir: str | None = None,
    ) -> None:
        _check_counts(first_k, repeat)
        self.paths = list_images(Path(root_path).expanduser())[:first_k]
        self.repeat = repeat
        self._store = open_store(self.paths, cache, cache_dir)

    @property
    def names(self) -> list[str]:
        """The file name of each sample."""
        return [path.name for path in self.paths] * self.repeat

    def name(self, index: int) -> str:
        return self.paths[index % len(self.paths)].name

    def __len__(self) -> int:
        return len(self.paths) * self.repeat

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; not to be changed in place."""
        return self._store[_checked(index, len(self)) % len(self.paths)]


class ImagePair(NamedTuple):
    """HR (s h, s w, 3) and LR (h, w, 3), uint8, with their whole-number scale s."""

    hr: np.ndarray
    lr: np.ndarray
    scale: int


@DATASETS.register("paired-image-folders")
class PairedImageFolders:
    """HR images and the LR images that go with them, paired by name.

    ``0801.png`` goes with ``0801.png``, ``0801x4.png``, ``0801_x4.png``, ``0801_LRBI_x4.png`` or
    the like; never with whatever is at the same place of a sorted list.

    Args:
        root_path_hr: folder of HR images.
        root_path_lr: folder of LR images.
        first_k, repeat, cache, cache_dir: as for `ImageFolder`.

    Raises:
        UserError: as `ImageFolder`; images without a partner (the first five are listed).
    """

    def __init__(
        self,
        *,
        root_path_hr: str,
        root_path_lr: str,
        first_k: int | None = None,
        repeat: int = 1,
        cache: str = "none",
        cache_dir: str | None = None,
    ) -> None:
        _check_counts(first_k, repeat)
        hr_paths = list_images(Path(root_path_hr).expanduser())
        lr_paths = list_images(Path(root_path_lr).expanduser())
        pairs = pair_by_name(hr_paths, lr_paths)[:first_k]
        self.hr_paths = [hr for hr, _ in pairs]
        self.lr_paths = [lr for _, lr in pairs]
        self.repeat = repeat
        self._hr = open_store(self.hr_paths, cache, cache_dir)
        self._lr = open_store(self.lr_paths, cache, cache_dir)

    @property
    def names(self) -> list[str]:
        """The HR file name of each sample."""
        return [path.name for path in self.hr_paths] * self.repeat

    def name(self, index: int) -> str:
        return self.hr_paths[index % len(self.hr_paths)].name

    def __len__(self) -> int:
        return len(self.hr_paths) * self.repeat

    def __getitem__(self, index: int) -> ImagePair:
        """The pair, cropped from the top left to where both have pixels.

        Raises:
            UserError: sizes without a common scale.
        """
        place = _checked(index, len(self)) % len(self.hr_paths)
        return align_pair(self._hr[place], self._lr[place], self.hr_paths[place].name)


def align_pair(hr: np.ndarray, lr: np.ndarray, name: str) -> ImagePair:
    """Find the whole-number scale of a pair and crop both from the top left to it.

    An HR size that is no multiple of the scale is accepted whether the LR size was rounded down
    or up from it.

    Raises:
        UserError: there is none.
    """
    (hr_height, hr_width), (lr_height, lr_width) = hr.shape[:2], lr.shape[:2]
    scale = max(1, round((hr_height / lr_height + hr_width / lr_width) / 2))
    excess = (abs(hr_height - scale * lr_height), abs(hr_width - scale * lr_width))
    height, width = min(lr_height, hr_height // scale), min(lr_width, hr_width // scale)
    if max(excess) >= scale or min(height, width) < 1:
        raise UserError(
            f"HR/LR mismatch: {name} is {hr_width}x{hr_height}, its LR {lr_width}x{lr_height}: "
            "no common scale (a whole number)"
        )
    return ImagePair(hr[: height * scale, : width * scale], lr[:height, :width], scale)


def pair_by_name(hr_paths: Sequence[Path], lr_paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pair HR with LR files by stem, in the order of `hr_paths`.

    Equal stems go first; then an LR stem without its scale suffix that equals an HR stem; then
    both without their suffixes.

    Raises:
        UserError: files without a partner, or several candidates for one.
    """
    pairs: dict[Path, Path] = {}
    hr_left, lr_left = list(hr_paths), list(lr_paths)
    for hr_is_stripped, lr_is_stripped in ((False, False), (False, True), (True, True)):
        hr_by_key = _by_key(hr_left, hr_is_stripped)
        lr_by_key = _by_key(lr_left, lr_is_stripped)
        for key in hr_by_key.keys() & lr_by_key.keys():
            hr_found, lr_found = hr_by_key[key], lr_by_key[key]
            if len(hr_found) > 1 or len(lr_found) > 1:
                names = ", ".join(
                    [f"HR {path.name}" for path in hr_found]
                    + [f"LR {path.name}" for path in lr_found]
                )
                raise UserError(f"HR/LR mismatch: more than one file for `{key}`: {names}")
            pairs[hr_found[0]] = lr_found[0]
        paired_lr = set(pairs.values())
        hr_left = [path for path in hr_left if path not in pairs]
        lr_left = [path for path in lr_left if path not in paired_lr]
    _refuse_orphans(hr_left, lr_left)
    return [(path, pairs[path]) for path in hr_paths]


def _by_key(paths: Iterable[Path], is_stripped: bool) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        key = _SUFFIX.sub("", path.stem) if is_stripped else path.stem
        found.setdefault(key, []).append(path)
    return found


def _refuse_orphans(hr_left: Sequence[Path], lr_left: Sequence[Path]) -> None:
    orphans = [f"HR {path.name}" for path in hr_left] + [f"LR {path.name}" for path in lr_left]
    if not orphans:
        return
    listed = ", ".join(orphans[:_ORPHANS_SHOWN])
    more = len(orphans) - _ORPHANS_SHOWN
    rest = f" and {more} more" if more > 0 else ""
    folder = (hr_left or lr_left)[0].parent
    raise UserError(
        f"HR/LR mismatch: {len(hr_left)} HR and {len(lr_left)} LR images have no partner, "
        f"first in {folder}: {listed}{rest}; a partner has the same name, with or without x4"
    )


def _checked(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"sample {index} of {length}")
    return index


def _check_counts(first_k: int | None, repeat: int) -> None:
    if first_k is not None and first_k < 1:
        raise UserError(f"first_k must be 1 or more, not {first_k}")
    if repeat < 1:
        raise UserError(f"repeat must be 1 or more, not {repeat}")
