"""Compares the models on picture files; pictures and log have the published names."""

import logging
from pathlib import Path

import numpy as np

from engine.conventions import Conventions
from engine.demo.compare import Comparison, compare
from engine.demo.jobs import Done, Setting, read_input
from engine.demo.report import comparison_table, describe_shares
from engine.evaluation import Restore
from engine.picture_files import check_folder
from utils.atomic import write_text
from utils.errors import UserError
from utils.images import Picture, is_one_of, to_8_bit, write_picture

_log = logging.getLogger(__name__)


class CompareJob:
    """Compares the models on a photograph; its pictures and log have the published names.

    Args:
        setting: see there.
        original: of the conventions' scale, or None.
        conventions: of the figures.
        heading: opens each log: what was run and how.
        subfolders: each photograph gets its own below `out_dir`.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        original: Restore | None,
        conventions: Conventions,
        heading: str,
        subfolders: bool,
    ) -> None:
        self.setting = setting
        self.original = original
        self.conventions = conventions
        self.heading = heading
        self.subfolders = subfolders

    def __call__(self, path: Path) -> Done:
        """Compare on one file.

        Raises:
            UserError, OSError: a picture that cannot be read, compared or written.
        """
        rgb = _read_hr(path)
        try:
            comparison = compare(
                path.name,
                rgb,
                self.setting.enlarger,
                self.original,
                self.conventions,
                device=self.setting.device,
                opacity=self.setting.opacity,
            )
        except UserError as error:
            raise UserError(f"image {path}: {error}") from error
        text = self._text(path, comparison)
        files = self._write(path, comparison, text)
        record = {
            "name": path.name,
            "hr_size_wh": list(comparison.hr_size[::-1]),
            "lr_size_wh": list(comparison.lr_size[::-1]),
            "original": comparison.original and comparison.original.to_json(),
            "pcsr": comparison.pcsr.to_json(),
            "files": [str(file) for file in files],
        }
        return Done(text, record, files, (comparison.original, comparison.pcsr))

    def _text(self, path: Path, comparison: Comparison) -> str:
        (h, w), (height, width) = comparison.lr_size, comparison.hr_size
        return "\n".join(
            [
                f"{path.name}: HR {width}x{height}, LR {w}x{h}",
                comparison_table(comparison.original, comparison.pcsr),
                describe_shares(comparison.pcsr.shares),
            ]
        )

    def _write(self, path: Path, comparison: Comparison, text: str) -> list[Path]:
        folder = self.setting.out_dir
        if self.subfolders:
            folder = folder / self.setting.stems[path]
            check_folder(folder)
        stale = folder / "Original.png"
        if "Original" not in comparison.pictures and stale.exists():
            _log.warning("%s is left from an earlier run", stale)
        files = [folder / f"{name}.png" for name in comparison.pictures]
        log = folder / "log.txt"
        for file in (*files, log):
            if is_one_of(file, self.setting.stems):
                raise UserError(f"{file} is an input and would be lost: choose another --out_dir")
        for file, rgb in zip(files, comparison.pictures.values(), strict=True):
            write_picture(file, Picture(rgb))
        write_text(log, f"{self.heading}\n\n{text}\n")
        return [*files, log]


def _read_hr(path: Path) -> np.ndarray:
    picture = read_input(path)
    if picture.alpha is not None:
        _log.warning("%s: its transparency is left out of the comparison", path)
    return to_8_bit(picture.rgb)
