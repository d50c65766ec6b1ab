"""Encoders of picture files, including the 16-bit kinds that Pillow lacks."""

import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
from PIL import Image

_SAVE_OPTIONS: dict[str, dict[str, object]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},
    ".bmp": {"format": "BMP"},
    ".tif": {"format": "TIFF", "compression": "tiff_lzw"},
    ".tiff": {"format": "TIFF", "compression": "tiff_lzw"},
}


def encode(samples: np.ndarray, suffix: str, icc_profile: bytes | None) -> bytes:
    """The bytes of a picture file.

    Args:
        samples: (H, W, 3 or 4) RGB or RGBA, uint8, or uint16 for png and tiff.
        suffix: lower case, with its dot.
        icc_profile: colour profile to embed (BMP has no room for one).

    Raises:
        ValueError, OSError, cv2.error: the format cannot hold the picture.
    """
    if samples.dtype == np.uint16:
        encode_16 = _encode_png_16 if suffix == ".png" else _encode_tiff_16
        return encode_16(samples, icc_profile)
    buffer = BytesIO()
    image = Image.fromarray(np.ascontiguousarray(samples))
    options = dict(_SAVE_OPTIONS[suffix])
    image.save(buffer, icc_profile=icc_profile, **options)  # type: ignore[arg-type]
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
