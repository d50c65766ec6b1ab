"""Pictures on disk, as arrays and as tensors.

Arrays are (H, W, 3) RGB, uint8 or uint16; tensors are (3, H, W) float32 RGB in [0, 1].
The bit depth follows from how a file stores its samples, never from their largest value.
"""

import functools
import logging
import os
import struct
import uuid
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from utils.errors import UserError

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# A 20000 x 20000 picture; an 8K frame has 33 million. More is refused before it is decoded.
MAX_PIXELS = 400_000_000

# (The JPEGs of many phones, which Pillow calls MPO, open as JPEG.)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_SAVE_OPTIONS: dict[str, dict[str, object]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF", "compression": "tiff_lzw"},
    ".tiff": {"format": "TIFF", "compression": "tiff_lzw"},
}
_WITH_ALPHA = (".png", ".webp", ".tif", ".tiff")
_WITH_16_BIT = (".png", ".tif", ".tiff")
_ORIENTATION_TAG = 0x0112


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
        and path.is_file()
    ]
    if not paths:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UserError(f"no images in {folder} (looked for {kinds})")
    return sorted(paths, key=lambda path: path.name)


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
    try:
        return _decode(data, name)
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UserError(
            f"image {name} is not a png, jpg, webp, bmp or tiff picture that can be read"
        ) from error
    # Decoders raise OSError, SyntaxError, struct.error, zlib.error, OverflowError and more.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"image {name} is damaged or cut short: {reason}") from error


@functools.cache
def _prepare_pillow() -> None:
    """Pillow's process-wide settings, once and not at import."""
    # Its own limit is 179 million pixels, below what this project must read; `_open` has ours.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
    # Said of damaged TIFFs on stderr, besides the exception that becomes our one line.
    for message in ("Corrupt EXIF data", "Truncated File Read", "Metadata Warning"):
        warnings.filterwarnings("ignore", message=message, module=r"PIL\.TiffImagePlugin")


def _open(data: bytes, name: str | Path) -> Image.Image:
    """Open the header and refuse absurd sizes; nothing is decoded yet."""
    _prepare_pillow()
    try:
        image = Image.open(BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"image {name} is too large (over {MAX_PIXELS} pixels)") from error
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"image {name} is too large: {image.width}x{image.height} is over {MAX_PIXELS} pixels"
        )
    return image


def _decode(data: bytes, name: str | Path) -> Picture:
    image = _open(data, name)
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
        samples = _decode_16_bit(data)
        # OpenCV turns TIFF pictures itself, PNG ones not.
        samples = samples if is_tiff else _turn(samples, orientation)
    else:
        samples = _decode_8_bit(ImageOps.exif_transpose(image))
    alpha = np.ascontiguousarray(samples[:, :, 3]) if samples.shape[2] == 4 else None
    return Picture(np.ascontiguousarray(samples[:, :, :3]), alpha, icc_profile)


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


def _decode_16_bit(data: bytes) -> np.ndarray:
    """(H, W, 3 or 4) uint16 from a 16-bit png or tiff, in OpenCV: Pillow keeps 8 of the bits."""
    samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        raise OSError("the 16-bit samples cannot be decoded")
    if samples.ndim == 2:
        return cv2.cvtColor(samples, cv2.COLOR_GRAY2RGB)
    if samples.shape[2] == 2:
        gray, alpha = samples[:, :, 0], samples[:, :, 1]
        return np.stack([gray, gray, gray, alpha], axis=2)
    code = cv2.COLOR_BGRA2RGBA if samples.shape[2] == 4 else cv2.COLOR_BGR2RGB
    return cv2.cvtColor(samples, code)


def _turn(samples_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation (1..8; anything else counts as upright)."""
    if orientation in (5, 6, 7, 8):
        samples_HWC = samples_HWC.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        samples_HWC = samples_HWC[::-1]
    if orientation in (2, 3, 6, 7):
        samples_HWC = samples_HWC[:, ::-1]
    return samples_HWC


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


def to_array(image_3HW: torch.Tensor, bit_depth: int = 8) -> np.ndarray:
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8 or uint16: clamped, then rounded."""
    if bit_depth not in (8, 16):
        raise ValueError(f"bit_depth must be 8 or 16, not {bit_depth}")
    largest = 2**bit_depth - 1
    samples = image_3HW.detach().float().clamp(0, 1).mul(largest).round_()
    dtype = np.uint8 if bit_depth == 8 else np.uint16
    return np.ascontiguousarray(samples.permute(1, 2, 0).cpu().numpy().astype(dtype))


def write_picture(path: str | Path, picture: Picture, exist_ok: bool = True) -> None:
    """Write `picture` in the format that the suffix of `path` names.

    The file appears complete or not at all: it is written under a temporary name in the same
    folder and renamed. JPEG and BMP drop alpha, all but PNG and TIFF round 16 bits to 8; a
    warning is logged. WebP is written without loss.

    Raises:
        UserError: unknown suffix, a picture that the format cannot hold, or an existing file with
            `exist_ok` false.
        OSError: the file cannot be written (no such folder, disk full); it names `path`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"cannot write {path}: its suffix is not one of {' '.join(IMAGE_SUFFIXES)}")
    if not exist_ok and path.exists():
        raise UserError(f"{path} exists already")
    picture = _fit_to_format(picture, path)
    try:
        data = _encode(picture, suffix)
    except (ValueError, OSError, cv2.error) as error:
        size = f"{picture.width}x{picture.height}"
        raise UserError(f"cannot write {path} ({size}) as {suffix[1:]}: {error}") from error
    write_bytes_atomically(path, data)


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary file beside `path`, then rename it.

    Raises:
        OSError: as `open` and `write` do, but naming `path`; what was there before is unharmed.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or "cannot be written", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


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


def _encode(picture: Picture, suffix: str) -> bytes:
    samples = picture.rgb
    if picture.alpha is not None:
        samples = np.concatenate([samples, picture.alpha[:, :, None]], axis=2)
    if picture.bit_depth == 16:
        encode = _encode_png_16 if suffix == ".png" else _encode_tiff_16
        return encode(samples, picture.icc_profile)
    buffer = BytesIO()
    image = Image.fromarray(np.ascontiguousarray(samples))
    options = dict(_SAVE_OPTIONS[suffix])
    image.save(buffer, icc_profile=picture.icc_profile, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _encode_png_16(samples: np.ndarray, icc_profile: bytes | None) -> bytes:
    code = cv2.COLOR_RGBA2BGRA if samples.shape[2] == 4 else cv2.COLOR_RGB2BGR
    done, encoded = cv2.imencode(".png", cv2.cvtColor(samples, code))
    if not done:
        raise OSError("the encoder failed")
    data = encoded.tobytes()
    if icc_profile is None:
        return data
    # OpenCV writes no profile. Its chunk goes behind the header: 8 bytes signature, 25 IHDR.
    body = b"iCCP" + b"ICC profile\0\0" + zlib.compress(icc_profile)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk + data[33:]


def _encode_tiff_16(samples: np.ndarray, icc_profile: bytes | None) -> bytes:
    """A baseline TIFF 6.0, one uncompressed strip: Pillow has no RGB16, OpenCV no profiles."""
    height, width, channels = samples.shape
    pixels = samples.astype("<u2").tobytes()
    bits = struct.pack(f"<{channels}H", *[16] * channels)
    profile = icc_profile or b""
    bits_at = 8 + len(pixels)
    profile_at = bits_at + len(bits)
    directory_at = profile_at + len(profile) + len(profile) % 2
    short, long, undefined = 3, 4, 7
    entries = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, bits_at),
        (259, short, 1, 1),  # no compression
        (262, short, 1, 2),  # RGB
        (273, long, 1, 8),  # where the strip starts
        (277, short, 1, channels),
        (278, long, 1, height),  # rows in the strip
        (279, long, 1, len(pixels)),
        (284, short, 1, 1),  # channels interleaved
    ]
    if channels == 4:
        entries.append((338, short, 1, 2))  # the fourth is alpha, not premultiplied
    if profile:
        entries.append((34675, undefined, len(profile), profile_at))
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    header = struct.pack("<2sHI", b"II", 42, directory_at)
    return header + pixels + bits + profile + b"\0" * (len(profile) % 2) + directory + b"\0" * 4
