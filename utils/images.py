"""Pictures on disk, as arrays and as tensors.

Arrays are (H, W, 3) RGB, uint8 or uint16; tensors are (3, H, W) float32 RGB in [0, 1].
The bit depth follows from how a file stores its samples, never from their largest value.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from utils.atomic import replace_file
from utils.errors import UserError
from utils.image_decoding import decode, decode_frames, decode_size
from utils.image_encoding import encode

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_WITH_ALPHA = (".png", ".webp", ".tif", ".tiff")
_WITH_16_BIT = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright (EXIF orientation is applied on reading).

    Attributes:
        rgb: (H, W, 3) uint8 or uint16; gray, palette and CMYK files are converted.
        alpha: (H, W), same dtype, not premultiplied; None where the file has no transparency.
        icc_profile: the embedded RGB colour profile, to be written with the result, or None.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None

    def __post_init__(self) -> None:
        if (
            self.rgb.ndim != 3
            or self.rgb.shape[2] != 3
            or self.rgb.dtype not in ("uint8", "uint16")
        ):
            raise ValueError(
                f"rgb must be (H, W, 3) uint8 or uint16, not {self.rgb.shape} {self.rgb.dtype}"
            )
        if self.alpha is not None and (
            self.alpha.shape != self.rgb.shape[:2] or self.alpha.dtype != self.rgb.dtype
        ):
            raise ValueError(
                f"alpha must be {self.rgb.shape[:2]} {self.rgb.dtype}, "
                f"not {self.alpha.shape} {self.alpha.dtype}"
            )

    @property
    def bit_depth(self) -> int:
        return 16 if self.rgb.dtype == np.uint16 else 8

    @property
    def height(self) -> int:
        return int(self.rgb.shape[0])

    @property
    def width(self) -> int:
        return int(self.rgb.shape[1])


def list_images(folder: str | Path) -> list[Path]:
    """The pictures directly inside `folder`, sorted by file name; hidden files are ignored.

    A link to nothing is one of them: who reads it is told.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"image folder {folder} {problem}")
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        # A link to nothing counts: without it there would be a picture less, and nobody would know.
        and (path.is_file() or not path.exists())
    ]
    if not paths:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UserError(f"no images in {folder} (looked for {kinds})")
    return sorted(paths, key=lambda path: path.name)


def is_one_of(path: Path, others: Iterable[Path]) -> bool:
    """Whether `path` exists and is one of these files, by whatever name."""
    return path.exists() and any(other.exists() and path.samefile(other) for other in others)


def read_bytes(path: str | Path) -> bytes:
    """The content of an image file.

    Raises:
        UserError: missing, not a file, unreadable or empty.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"image {path} {problem}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror or error}") from error
    if not data:
        raise UserError(f"image {path} is an empty file")
    return data


def read_picture(path: str | Path) -> Picture:
    """Read a png, jpg, webp, bmp or tiff file (recognised by content, not by name).

    Raises:
        UserError: missing, empty, cut short, damaged, too large or no picture at all; the message
            names the path.
    """
    return decode_picture(read_bytes(path), path)


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a picture as (H, W, 3) uint8; 16-bit samples are rounded, transparency is dropped."""
    return to_8_bit(read_picture(path).rgb)


def decode_picture(data: bytes, name: str | Path) -> Picture:
    """Decode the bytes of an image file; `name` is used in messages. Errors as `read_picture`."""
    samples, icc_profile = decode(data, name)
    alpha = np.ascontiguousarray(samples[:, :, 3]) if samples.shape[2] == 4 else None
    return Picture(np.ascontiguousarray(samples[:, :, :3]), alpha, icc_profile)


def read_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of the upright picture from the header alone. Errors as `read_picture`."""
    if not Path(path).is_file() or not Path(path).stat().st_size:
        read_bytes(path)  # says what is wrong
    with Path(path).open("rb") as file:
        return decode_size(file, path)


def count_frames(path: str | Path) -> int:
    """How many pictures a file holds, of which the first is read: animations, pages of a TIFF.

    Errors as `read_size`.
    """
    with Path(path).open("rb") as file:
        return decode_frames(file, path)


def to_8_bit(samples: np.ndarray) -> np.ndarray:
    """uint16 samples rounded to uint8 (65535 becomes 255); uint8 ones as they are."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_tensor(rgb: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 or uint16 -> (3, H, W) float32 in [0, 1]; the memory is not shared."""
    largest = 65535.0 if rgb.dtype == np.uint16 else 255.0
    samples = np.ascontiguousarray(rgb.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(samples).div_(largest)


_STRIP_ROWS = 256


def to_array(image_3HW: torch.Tensor, bit_depth: int = 8) -> np.ndarray:
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8 or uint16: clamped, then rounded."""
    if bit_depth not in (8, 16):
        raise ValueError(f"bit_depth must be 8 or 16, not {bit_depth}")
    channels, height, width = image_3HW.shape
    array = np.empty((height, width, channels), np.uint8 if bit_depth == 8 else np.uint16)
    # In strips: a float copy of an 8K picture would take 0.4 GB.
    for top in range(0, height, _STRIP_ROWS):
        strip = image_3HW[:, top : top + _STRIP_ROWS].detach().float().clamp(0, 1)
        strip = strip.mul_(2**bit_depth - 1).round_()
        array[top : top + _STRIP_ROWS] = strip.permute(1, 2, 0).cpu().numpy()
    return array


def write_picture(path: str | Path, picture: Picture, exist_ok: bool = True) -> None:
    """Write `picture` in the format that the suffix of `path` names.

    The file appears complete or not at all, even if the machine fails: see `replace_file`.

    Raises:
        UserError: as `encode_picture`, or an existing file with `exist_ok` false.
        OSError: the file cannot be written (disk full, no permission); it names `path`.
    """
    path = Path(path)
    if not exist_ok and path.exists():
        raise UserError(f"{path} exists already")
    data = encode_picture(picture, path)
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


def encode_picture(picture: Picture, path: str | Path) -> bytes:
    """The bytes of a picture file in the format that the suffix of `path` names.

    JPEG and BMP drop alpha, all but PNG and TIFF round 16 bits to 8; a warning is logged. WebP is
    compressed without loss.

    Raises:
        UserError: unknown suffix, or a picture that the format cannot hold.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"cannot write {path}: its suffix is not one of {' '.join(IMAGE_SUFFIXES)}")
    picture = _fit_to_format(picture, path)
    samples = picture.rgb
    if picture.alpha is not None:
        samples = np.concatenate([samples, picture.alpha[:, :, None]], axis=2)
    try:
        return encode(samples, suffix, picture.icc_profile)
    except (ValueError, OSError, cv2.error) as error:
        size = f"{picture.width}x{picture.height}"
        raise UserError(f"cannot write {path} ({size}) as {suffix[1:]}: {error}") from error


def _fit_to_format(picture: Picture, path: Path) -> Picture:
    suffix = path.suffix.lower()
    rgb, alpha = picture.rgb, picture.alpha
    if alpha is not None and suffix not in _WITH_ALPHA:
        _log.warning("%s: %s has no transparency; alpha is dropped", path, suffix[1:])
        alpha = None
    if picture.bit_depth == 16 and suffix not in _WITH_16_BIT:
        _log.warning("%s: %s has no 16-bit samples; rounded to 8 bits", path, suffix[1:])
        rgb, alpha = to_8_bit(rgb), None if alpha is None else to_8_bit(alpha)
    return Picture(rgb, alpha, picture.icc_profile)
