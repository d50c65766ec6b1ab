"""Enlarges picture files: read, compute, write under a name that loses nothing."""

from pathlib import Path

from engine.demo.jobs import Done, Setting, read_input
from engine.demo.report import describe_shares
from engine.demo.upscale import output_size, upscale
from engine.picture_files import check_fits, first_free
from utils.images import IMAGE_SUFFIXES, Picture, is_one_of, write_picture


class UpscaleJob:
    """Enlarges a picture; the result is named after it, beside its class map if wanted.

    Args:
        setting: see there.
        scale: output per input pixels; used where `size` is None.
        size: (H, W) of every result.
        suffix: of the results; None keeps each input's.
        class_map: also write the class map.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        scale: float,
        size: tuple[int, int] | None = None,
        suffix: str | None = None,
        class_map: bool = False,
    ) -> None:
        self.setting = setting
        self.scale = scale
        self.size = size
        self.suffix = suffix
        self.class_map = class_map

    def __call__(self, path: Path) -> Done:
        """Enlarge one file.

        Raises:
            UserError, OSError: a picture that cannot be read, enlarged or written.
        """
        picture = read_input(path)
        size = output_size((picture.height, picture.width), self.scale, self.size)
        target, map_target = self._targets(path)
        check_fits(target, size)
        result = upscale(
            picture,
            size,
            self.setting.enlarger,
            device=self.setting.device,
            opacity=self.setting.opacity if self.class_map else None,
        )
        write_picture(target, result.picture)
        files = [target]
        if result.class_map is not None:
            write_picture(map_target, Picture(result.class_map))
            files.append(map_target)
        restored = result.restored
        text = (
            f"{path.name}: {picture.width}x{picture.height} -> {size[1]}x{size[0]}, "
            f"{describe_shares(restored.shares)}, {restored.time_s:.2f} s -> {target}"
        )
        record = {
            "name": path.name,
            "output": str(target),
            "class_map": str(map_target) if self.class_map else None,
            "input_size_wh": [picture.width, picture.height],
            "output_size_wh": [size[1], size[0]],
            "flops_paper": restored.flops_paper,
            "flops_executed": restored.flops_executed,
            "shares": restored.shares,
            "time_s": restored.time_s,
        }
        return Done(text, record, files)

    def _targets(self, path: Path) -> tuple[Path, Path]:
        """Where the result and its class map go.

        Earlier results are replaced, inputs never are. In a folder that holds inputs nothing at
        all is replaced, as everything there may be the user's own: a name that is taken gets a
        number.
        """
        folder, inputs = self.setting.out_dir, self.setting.stems
        suffix = self.suffix or path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            suffix = ".png"
        tag = f"x{self.scale:g}" if self.size is None else f"{self.size[1]}x{self.size[0]}"
        among_inputs = folder.exists() and any(folder.samefile(each.parent) for each in inputs)

        def targets(stem: str) -> tuple[Path, Path]:
            return folder / f"{stem}{suffix}", folder / f"{stem}_classes.png"

        def is_free(stem: str) -> bool:
            names = targets(stem)
            if among_inputs:
                return not any(name.exists() for name in names)
            return not any(is_one_of(name, inputs) for name in names)

        return targets(first_free(f"{inputs[path]}_{tag}", is_free))
