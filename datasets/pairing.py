"""Which LR image belongs to which HR image, and the scale of a pair."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.errors import UserError

# What published data sets append to a name: 0801x4, 0801x4m, baby_LRBI_x4, 0801LRx4, img_001_HR.
_SUFFIX = re.compile(
    r"(?:(?:[_-]?[LH]R(?:BI|BD|DN)?)?[_-]?x\d(?:\.\d+)?[mdw]?|[_-][LH]R(?:BI|BD|DN)?)$",
    re.IGNORECASE,
)
_ORPHANS_SHOWN = 5


class ImagePair(NamedTuple):
    """HR (s h, s w, 3) and LR (h, w, 3), uint8, with their whole-number scale s."""

    hr: np.ndarray
    lr: np.ndarray
    scale: int


def align_pair(hr: np.ndarray, lr: np.ndarray, name: str) -> ImagePair:
    """Find the whole-number scale of a pair and crop both from the top left to it.

    An HR size that is no multiple of the scale is accepted whether the LR size was rounded down
    or up from it.

    Raises:
        UserError: there is none.
    """
    scale, (height, width) = common_size(hr.shape[:2], lr.shape[:2], name)
    return ImagePair(hr[: height * scale, : width * scale], lr[:height, :width], scale)


def common_size(
    hr_size: tuple[int, ...], lr_size: tuple[int, ...], name: str
) -> tuple[int, tuple[int, int]]:
    """The scale of a pair of these (H, W) and (h, w), and the LR size where both have pixels.

    Raises:
        UserError: there is none.
    """
    (hr_height, hr_width), (lr_height, lr_width) = hr_size, lr_size
    scale = max(1, round((hr_height / lr_height + hr_width / lr_width) / 2))
    excess = (abs(hr_height - scale * lr_height), abs(hr_width - scale * lr_width))
    height, width = min(lr_height, hr_height // scale), min(lr_width, hr_width // scale)
    if max(excess) >= scale or min(height, width) < 1:
        raise UserError(
            f"HR/LR mismatch: {name} is {hr_width}x{hr_height}, its LR {lr_width}x{lr_height}: "
            "no common scale (a whole number)"
        )
    return scale, (height, width)


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
