"""Decoders of picture files: every Pillow mode and 16 bits, upright, as RGB or RGBA samples."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from utils.errors import UserError, first_line

_log = logging.getLogger(__name__)

# A 20000 x 20000 picture; an 8K frame has 33 million. More is refused before it is decoded.
MAX_PIXELS = 400_000_000

# The JPEGs of many phones, which Pillow calls MPO, open as JPEG.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG, _WHITE_IS_ZERO = 262, 0
_EXTRA_SAMPLES_TAG = 338
_WHITE_16 = 65535


def decode(data: bytes, name: str | Path) -> tuple[np.ndarray, bytes | None]:
    """Decode the bytes of a png, jpg, webp, bmp or tiff file.

    Returns:
        (H, W, 3 or 4) RGB or RGBA samples, uint8 or uint16 as stored, EXIF orientation applied;
        and the embedded RGB colour profile or None.

    Raises:
        UserError: cut short, damaged, too large or no picture at all; `name` is in the message.
    """
    with _named_errors(name):
        return _decode(data, name)


def decode_size(file: IO[bytes], name: str | Path) -> tuple[int, int]:
    """(H, W) of the upright picture, from the header of an open file. Errors as `decode`."""
    with _named_errors(name), _open(file, name) as image:
        width, height = image.size
        if image.format == "TIFF":
            # Pillow has swapped these already, or not, by its version.
            tags = image.tag_v2  # type: ignore[attr-defined]
            width, height = tags[256], tags[257]
        turned = image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def decode_frames(file: IO[bytes], name: str | Path) -> int:
    """How many pictures an open file holds. Errors as `decode`."""
    with _named_errors(name), _open(file, name) as image:
        return getattr(image, "n_frames", 1)


@contextlib.contextmanager
def _named_errors(name: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into a UserError that names the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"image {name} is not a png, jpg, webp, bmp or tiff picture that can be read"
        ) from error
    # Decoders raise OSError, SyntaxError, struct.error, zlib.error, OverflowError and more.
    except Exception as error:
        raise UserError(f"image {name} is damaged or cut short: {first_line(error)}") from error


@functools.cache
def _prepare_pillow() -> None:
    """Pillow's process-wide settings, once and not at import."""
    # Its own limit is 179 million pixels, below what this project must read; `_open` has ours.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
    # Said of damaged TIFFs on stderr, besides the exception that becomes our one line.
    for message in ("Corrupt EXIF data", "Truncated File Read", "Metadata Warning"):
        warnings.filterwarnings("ignore", message=message, module=r"PIL\.TiffImagePlugin")


def _open(source: IO[bytes], name: str | Path) -> Image.Image:
    """Open the header and refuse absurd sizes; nothing is decoded yet."""
    _prepare_pillow()
    try:
        image = Image.open(source, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large (over {MAX_PIXELS} pixels)") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"image {name} is too large: {image.width}x{image.height} is over {MAX_PIXELS} pixels"
        )
    return image


def _decode(data: bytes, name: str | Path) -> tuple[np.ndarray, bytes | None]:
    image = _open(BytesIO(data), name)
    stored_bits = _stored_bits(data, image)
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    icc_profile = _rgb_profile(image)
    # Pillow notices when a file ends early; OpenCV returns a half decoded picture.
    image.load()
    if stored_bits > 8:
        is_tiff = image.format == "TIFF"
        planar = is_tiff and image.tag_v2.get(284) == 2  # type: ignore[attr-defined]
        if stored_bits != 16 or image.mode in ("F", "CMYK") or planar:
            layout = "planar " if planar else ""
            raise UserError(
                f"image {name} has {stored_bits}-bit {layout}{image.mode} samples; 8 and 16 bit "
                "gray and RGB are supported"
            )
        samples = _decode_16_bit(data, image)
        # OpenCV turns TIFF pictures itself, PNG ones not.
        samples = samples if is_tiff else _turn(samples, orientation)
    else:
        key = image.info.get("transparency")
        if image.mode == "L" and stored_bits in (2, 4) and isinstance(key, int):
            # Pillow spreads the samples over 8 bits, and leaves the transparent one as it is.
            highest = 2**stored_bits - 1
            image.info["transparency"] = key * 255 // highest if key <= highest else key
        samples = _decode_8_bit(ImageOps.exif_transpose(image))
    return samples, icc_profile


def _stored_bits(data: bytes, image: Image.Image) -> int:
    """Bits per sample in the file; Pillow's mode does not tell (RGB16 files open as RGB)."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return int(max(bits) if isinstance(bits, tuple) else bits)
    return 8


def _rgb_profile(image: Image.Image) -> bytes | None:
    """The embedded profile if it describes RGB; a gray or CMYK one does not fit the result."""
    profile = image.info.get("icc_profile")
    return profile if profile and profile[16:20] == b"RGB " else None


def _decode_8_bit(image: Image.Image) -> np.ndarray:
    """(H, W, 3 or 4) uint8 from any 8-bit (or smaller) Pillow image."""
    if image.mode == "CMYK":
        return np.array(_cmyk_to_rgb(image))
    has_alpha = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
    if image.mode == "1" and has_alpha:
        # Whether the transparent value comes as 0 and 1 or as 0 and 255 depends on Pillow's age.
        image = image.convert("L")
        image.info["transparency"] = 255 if image.info["transparency"] else 0
    return np.array(image.convert("RGBA" if has_alpha else "RGB"))


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            _log.debug("unusable CMYK profile; converting without it")
    return image.convert("RGB")


def _decode_16_bit(data: bytes, image: Image.Image) -> np.ndarray:
    """(H, W, 3 or 4) uint16 from a 16-bit png or tiff, in OpenCV: Pillow keeps 8 of the bits.

    Args:
        image: the same as Pillow opened it, for what OpenCV does not look at.
    """
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        raise OSError("the 16-bit samples cannot be decoded")
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    samples = samples[:, :, None] if samples.ndim == 2 else samples
    if samples.shape[2] <= 2:
        gray, alpha = samples[:, :, :1], samples[:, :, 1:]
        key = image.info.get("transparency")
        if alpha.shape[2] == 0 and isinstance(key, int):
            alpha = np.where(gray == key, 0, _WHITE_16).astype(np.uint16)
        if tags.get(_PHOTOMETRIC_TAG) == _WHITE_IS_ZERO:
            gray = _WHITE_16 - gray
        samples = np.concatenate([gray, gray, gray, alpha], axis=2)
    else:
        code = cv2.COLOR_BGRA2RGBA if samples.shape[2] == 4 else cv2.COLOR_BGR2RGB
        samples = cv2.cvtColor(samples, code)
    # Where the tag is missing, as in Pillow for 8 bits: alpha, not premultiplied.
    kind = tags.get(_EXTRA_SAMPLES_TAG, (2,))
    kind = kind[0] if isinstance(kind, tuple) else kind
    if samples.shape[2] == 4 and kind == 0:
        return np.ascontiguousarray(samples[:, :, :3])
    return _divided_by_alpha(samples) if samples.shape[2] == 4 and kind == 1 else samples


def _divided_by_alpha(samples: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint16 RGBA whose colours were multiplied by alpha, without that."""
    alpha = samples[:, :, 3:].astype(np.uint32)
    rgb = (samples[:, :, :3].astype(np.uint32) * _WHITE_16 + alpha // 2) // np.maximum(alpha, 1)
    rgb = np.where(alpha > 0, np.minimum(rgb, _WHITE_16), 0)
    return np.concatenate([rgb, alpha], axis=2).astype(np.uint16)


def _turn(samples_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8; anything else counts as upright)."""
    if orientation in (5, 6, 7, 8):
        samples_HWC = samples_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        samples_HWC = samples_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        samples_HWC = samples_HWC[:, ::-1]
    return samples_HWC
