"""Folders of images, and pairs of folders, as map-style data sets.

Both give (H, W, 3) uint8 RGB; 16-bit files are rounded, gray ones converted, alpha is dropped.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from datasets.cache import ImageStore, check_cache, open_store
from datasets.pairing import ImagePair, align_pair, pair_by_name
from datasets.registry import DATASETS
from utils.errors import UserError
from utils.images import list_images, read_rgb

OnError = Literal["stop", "skip"]


class _Images:
    """What image folders and pairs of them share: files, a cache of them, and damaged ones.

    Nothing is decoded before :meth:`load`, or else before the first image is asked for: other
    mistakes come to light first.

    Args:
        rows: for each image its file, or its files.
        first_k, repeat, cache, cache_dir, cache_share, on_error: see `ImageFolder`.
    """

    def __init__(
        self,
        rows: Sequence[tuple[Path, ...]],
        first_k: int | None,
        repeat: int,
        cache: str,
        cache_dir: str | None,
        cache_share: float,
        on_error: OnError,
    ) -> None:
        _check_counts(first_k, repeat)
        if not 0 < cache_share <= 1:
            raise UserError(f"cache_share must be above 0 and at most 1, not {cache_share}")
        self.columns = [list(column) for column in zip(*rows[:first_k], strict=True)]
        self.repeat = repeat
        self.cache = check_cache(cache)
        self.cache_share = cache_share
        self.on_error = on_error
        self._cache_dir = cache_dir
        self._stores: list[ImageStore] | None = None
        # In shared memory: what a loader process has met, its own process and the others see, too.
        self._damaged = torch.zeros(len(self.columns[0]), dtype=torch.bool)
        if on_error == "skip":
            self._damaged.share_memory_()
        self._told = torch.zeros_like(self._damaged)
        self._reasons: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        """The file name of each sample (of a pair, the HR image's)."""
        return [path.name for path in self.columns[0]] * self.repeat

    def name(self, index: int) -> str:
        """The file name of one sample, or of what stands in for it."""
        return self.columns[0][self.place(index)].name

    def __len__(self) -> int:
        return len(self.columns[0]) * self.repeat

    def load(self, cache: str | None = None) -> None:
        """Fill the cache, which otherwise happens when the first image is asked for.

        Data loader processes share what was decoded before they were forked.

        Args:
            cache: instead of the data set's own. ``device`` is for whole batches, see
                `datasets.batches`; single images then come from memory.

        Raises:
            UserError: an image that cannot be decoded, unless those are skipped.
        """
        cache = cache or self.cache
        cache = "in_memory" if cache == "device" else cache
        self._stores = [
            open_store(column, cache, self._cache_dir, self.note_damaged) for column in self.columns
        ]

    def place(self, index: int) -> int:
        """Which of the files a sample is made of; of damaged ones, the next that is not.

        Raises:
            UserError: all are damaged.
        """
        count = len(self.columns[0])
        first = index % count
        if not self._damaged[first]:
            return first
        for place in range(first + 1, first + count):
            if not self._damaged[place % count]:
                return place % count
        folder = self.columns[0][0].parent
        raise UserError(f"no image in {folder} can be read, for example: {self._reason(first)}")

    def note_damaged(self, place: int, error: UserError) -> None:
        """An image cannot be read: end, or do without it from now on, as `on_error` says."""
        if self.on_error == "stop":
            raise error
        self._reasons[place] = str(error)
        self._damaged[place] = True

    def has_untold(self) -> bool:
        """Whether :meth:`untold` would have any; cheap enough for every iteration."""
        return self.on_error == "skip" and bool((self._damaged & ~self._told).any())

    def untold(self) -> dict[str, str]:
        """What is skipped and was not told before, by file: why each cannot be read.

        What a loader process of this one has met is among it. Files are told once; a pair by its
        HR image.
        """
        places = (self._damaged & ~self._told).nonzero().flatten().tolist()
        self._told[places] = True
        return {str(self.columns[0][place]): self._reason(place) for place in places}

    def _reason(self, place: int) -> str:
        """Why an image cannot be read. Of what another process met, only that it did is known."""
        if place in self._reasons:
            return self._reasons[place]
        paths = [column[place] for column in self.columns]
        try:
            for path in paths:
                read_rgb(path)
        except UserError as error:
            return str(error)
        return f"image {paths[0]} could not be read when it was needed, and can be now"

    def _read(self, index: int) -> tuple[int, list[np.ndarray]]:
        """A sample's place and its images, (H, W, 3) uint8."""
        if self._stores is None:
            self.load()
        assert self._stores is not None
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        while True:
            place = self.place(index)
            try:
                return place, [store[place] for store in self._stores]
            except UserError as error:
                self.note_damaged(place, error)


@DATASETS.register("image-folder")
class ImageFolder(_Images):
    """The images directly inside a folder, sorted by name.

    Args:
        root_path: the folder; not searched recursively.
        first_k: take only the first so many images.
        repeat: count each image so many times per epoch.
        cache: ``none``, ``in_memory``, ``lmdb`` (see `datasets.cache.open_store`) or ``device``:
            in training, all pixels are kept on the device and whole batches are made there.
        cache_dir: where the LMDB goes, if not into the user's cache folder.
        cache_share: the part of the device's free memory that ``device`` may take.
        on_error: what a damaged image among the training data does: ``stop`` ends the run, for
            ``skip`` the next image takes its place, and training names it once.

    Raises:
        UserError: no such folder, no images, or arguments out of range; on `load` or access, a
            damaged image.
    """

    def __init__(
        self,
        *,
        root_path: str,
        first_k: int | None = None,
        repeat: int = 1,
        cache: str = "none",
        cache_dir: str | None = None,
        cache_share: float = 0.5,
        on_error: OnError = "stop",
    ) -> None:
        rows = [(path,) for path in list_images(Path(root_path).expanduser())]
        super().__init__(rows, first_k, repeat, cache, cache_dir, cache_share, on_error)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return self.columns[0]

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB; not to be changed in place."""
        return self._read(index)[1][0]


@DATASETS.register("paired-image-folders")
class PairedImageFolders(_Images):
    """HR images and the LR images that go with them, paired by name.

    ``0801.png`` goes with ``0801.png``, ``0801x4.png``, ``0801_x4.png``, ``0801_LRBI_x4.png`` or
    the like; never with whatever is at the same place of a sorted list.

    Args:
        root_path_hr: folder of HR images.
        root_path_lr: folder of LR images.
        first_k, repeat, cache, cache_dir, cache_share, on_error: as for `ImageFolder`; a pair is
            damaged where one of its images is.

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
        cache_share: float = 0.5,
        on_error: OnError = "stop",
    ) -> None:
        hr_paths = list_images(Path(root_path_hr).expanduser())
        lr_paths = list_images(Path(root_path_lr).expanduser())
        rows = pair_by_name(hr_paths, lr_paths)
        super().__init__(rows, first_k, repeat, cache, cache_dir, cache_share, on_error)

    @property
    def hr_paths(self) -> list[Path]:
        """The HR files."""
        return self.columns[0]

    @property
    def lr_paths(self) -> list[Path]:
        """The LR files, in the order of the HR files."""
        return self.columns[1]

    def __getitem__(self, index: int) -> ImagePair:
        """The pair, cropped from the top left to where both have pixels.

        Raises:
            UserError: sizes without a common scale.
        """
        place, (hr, lr) = self._read(index)
        return align_pair(hr, lr, self.hr_paths[place].name)


def _check_counts(first_k: int | None, repeat: int) -> None:
    if first_k is not None and first_k < 1:
        raise UserError(f"first_k must be 1 or more, not {first_k}")
    if repeat < 1:
        raise UserError(f"repeat must be 1 or more, not {repeat}")
