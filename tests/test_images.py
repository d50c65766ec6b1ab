"""Pictures survive reading and writing in every mode; damaged files are refused by name."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.errors import UserError
from utils.images import (
    Picture,
    decode_picture,
    list_images,
    read_picture,
    read_rgb,
    read_size,
    to_8_bit,
    to_array,
    to_tensor,
    write_picture,
)

RNG = np.random.default_rng(0)
RGB8 = RNG.integers(0, 256, (7, 10, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (7, 10, 3), dtype=np.uint16)
ALPHA8 = RNG.integers(0, 256, (7, 10), dtype=np.uint8)
ALPHA16 = RNG.integers(0, 65536, (7, 10), dtype=np.uint16)
# The header of a profile says what it describes; no reader here looks further.
RGB_PROFILE = bytes(16) + b"RGB " + bytes(107)

UPRIGHT = {
    1: RGB8,
    2: RGB8[:, ::-1],
    3: RGB8[::-1, ::-1],
    4: RGB8[::-1],
    5: RGB8.transpose(1, 0, 2),
    6: np.rot90(RGB8, -1),
    7: RGB8[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(RGB8),
}


# What a folder of pictures lists, a link to nothing among them.
NAMES = ["a.jpg", "b.PNG", "c10.tif", "c9.tif", "gone.png"]


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".webp", ".bmp"])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_8_bit_round_trip(tmp_path: Path, suffix: str, with_alpha: bool) -> None:
    path = tmp_path / f"Größe 写真{suffix}"
    write_picture(path, Picture(RGB8, ALPHA8 if with_alpha else None, RGB_PROFILE))
    again = read_picture(path)
    assert again.bit_depth == 8
    np.testing.assert_array_equal(again.rgb, RGB8)
    if suffix == ".bmp":
        assert again.alpha is None
        return
    assert again.icc_profile == RGB_PROFILE
    assert (again.alpha is not None) == with_alpha
    if with_alpha:
        np.testing.assert_array_equal(again.alpha, ALPHA8)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("alpha", [None, ALPHA16])
def test_16_bit_round_trip(tmp_path: Path, suffix: str, alpha: np.ndarray | None) -> None:
    path = tmp_path / f"deep{suffix}"
    write_picture(path, Picture(RGB16, alpha, RGB_PROFILE))
    again = read_picture(path)
    assert again.bit_depth == 16
    assert again.icc_profile == RGB_PROFILE
    np.testing.assert_array_equal(again.rgb, RGB16)
    if alpha is not None:
        np.testing.assert_array_equal(again.alpha, alpha)
    # Other programs must be able to open it, too.
    with Image.open(path) as image:
        image.load()
        assert image.info["icc_profile"] == RGB_PROFILE


def test_dark_16_bit_picture_stays_16_bit(tmp_path: Path) -> None:
    write_picture(tmp_path / "dark.png", Picture(RGB16 % 200))
    assert read_picture(tmp_path / "dark.png").bit_depth == 16
    assert read_rgb(tmp_path / "dark.png").max() <= 1


def test_16_bits_are_rounded_where_the_format_has_8(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_picture(tmp_path / "a.bmp", Picture(RGB16, ALPHA16))
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.bmp"), to_8_bit(RGB16))
    assert "rounded to 8 bits" in caplog.text
    assert "alpha is dropped" in caplog.text


def test_jpeg_gray_and_cmyk() -> None:
    gray = Image.fromarray(RGB8[:, :, 0])
    assert decode_picture(encoded(gray, "JPEG"), "g").rgb.shape == (7, 10, 3)
    white = Image.new("CMYK", (10, 7), (0, 0, 0, 0))
    assert decode_picture(encoded(white, "JPEG"), "c").rgb.min() >= 250


@pytest.mark.parametrize("kind", ["1", "L", "LA", "P", "I;16", "P with transparency"])
def test_png_modes(kind: str) -> None:
    gray = RGB8[:, :, 0]
    palette = Image.fromarray(RGB8).quantize(8)
    alpha: np.ndarray | None = None
    if kind == "1":
        data = encoded(Image.fromarray(gray > 127), "PNG")
        expected = np.where(gray > 127, 255, 0)
    elif kind == "L":
        data, expected = encoded(Image.fromarray(gray), "PNG"), gray
    elif kind == "LA":
        image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(ALPHA8)])
        data, expected, alpha = encoded(image, "PNG"), gray, ALPHA8
    elif kind == "I;16":
        data, expected = encoded(Image.fromarray(RGB16[:, :, 0]), "PNG"), RGB16[:, :, 0]
    else:
        expected = np.array(palette.convert("RGB"))
        options = {"transparency": b"\x00\x80"} if "transparency" in kind else {}
        data = encoded(palette, "PNG", **options)
        if options:
            alpha = np.array([0, 128, 255, 255, 255, 255, 255, 255])[np.array(palette)]
    picture = decode_picture(data, kind)
    if expected.ndim == 2:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(picture.rgb, expected)
    assert (picture.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_array_equal(picture.alpha, alpha)


def png(bits: int, colour: int, samples: bytes, transparent: bytes) -> bytes:
    """A picture of two pixels with a transparent value; Pillow writes none of these."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + samples))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("bits", "colour", "samples", "transparent", "first"),
    [
        (2, 0, b"\x70", (1,), 85),
        (4, 0, b"\x3f", (3,), 51),
        (8, 0, b"\x03\xff", (3,), 3),
        (16, 0, struct.pack(">2H", 1000, 65535), (1000,), 1000),
        (16, 2, struct.pack(">6H", 7, 7, 7, *[65535] * 3), (7, 7, 7), 7),
    ],
)
def test_png_transparent_value(
    bits: int, colour: int, samples: bytes, transparent: tuple[int, ...], first: int
) -> None:
    key = struct.pack(f">{len(transparent)}H", *transparent)
    picture = decode_picture(png(bits, colour, samples, key), "p")
    highest = 65535 if bits == 16 else 255
    np.testing.assert_array_equal(picture.rgb, [[[first] * 3, [highest] * 3]])
    np.testing.assert_array_equal(picture.alpha, [[0, highest]])


def tiff(bits: int, photometric: int, samples: list[int], extra: int | None = None) -> bytes:
    """A picture of two pixels, uncompressed."""
    count = len(samples) // 2
    pixels = np.array(samples, "<u2" if bits == 16 else "u1").tobytes()
    depths = struct.pack(f"<{count}H", *[bits] * count)
    entries = [
        (256, 4, 1, 2),
        (257, 4, 1, 1),
        (258, 3, count, bits if count == 1 else 8 + len(pixels)),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, count),
        (278, 4, 1, 1),
        (279, 4, 1, len(pixels)),
        *([] if extra is None else [(338, 3, 1, extra)]),
    ]
    start = 8 + len(pixels) + len(depths)
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return struct.pack("<2sHI", b"II", 42, start) + pixels + depths + directory


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_gray_may_count_from_white(bits: int) -> None:
    highest = 2**bits - 1
    found = [decode_picture(tiff(bits, kind, [10, 200]), "t").rgb[0, :, 0] for kind in (0, 1)]
    np.testing.assert_array_equal(found, [[highest - 10, highest - 200], [10, 200]])


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_fourth_sample_is_what_the_file_says(bits: int) -> None:
    """Nothing, alpha that colours were multiplied by, or plain alpha, as where nothing is said."""
    half = 2 ** (bits - 1)
    samples = [1, 2, 3, 0, 80, 40, 20, half]
    unused, multiplied, plain, silent = (
        decode_picture(tiff(bits, 2, samples, extra), "t") for extra in (0, 1, 2, None)
    )
    for picture in (unused, plain, silent):
        np.testing.assert_array_equal(picture.rgb, [[[1, 2, 3], [80, 40, 20]]])
    assert unused.alpha is None
    for picture in (multiplied, plain, silent):
        np.testing.assert_array_equal(picture.alpha, [[0, half]])
    np.testing.assert_allclose(multiplied.rgb, [[[0, 0, 0], [160, 80, 40]]], atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_at_both_depths(tmp_path: Path, orientation: int) -> None:
    upright = UPRIGHT[orientation]
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encoded(Image.fromarray(RGB8), kind, exif=exif(orientation), **options)
        np.testing.assert_array_equal(decode_picture(data, kind).rgb, upright)
        (tmp_path / "turned").write_bytes(data)
        assert read_size(tmp_path / "turned") == upright.shape[:2]
    write_picture(tmp_path / "deep.png", Picture(RGB8.astype(np.uint16) * 257))
    data = (tmp_path / "deep.png").read_bytes()
    body = b"eXIf" + exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    deep = decode_picture(data[:33] + chunk + data[33:], "deep")
    np.testing.assert_array_equal(deep.rgb // 257, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "16-bit png", "16-bit tif"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    if kind.startswith("16"):
        path = tmp_path / f"whole.{kind[-3:]}"
        write_picture(path, Picture(RGB16))
        data = path.read_bytes()
    else:
        data = encoded(Image.fromarray(RGB8), kind)
    # A PNG that lacks only its end mark holds all of its pixels.
    for length in range(1, len(data) - 40, max(1, len(data) // 40)):
        path = tmp_path / "cut.png"
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.png") as caught:
            read_picture(path)
        assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture\n")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, reason in [
        ("text.png", "not a png"),
        ("empty.png", "empty file"),
        ("folder.png", "not a file"),
        ("missing.png", "does not exist"),
    ]:
        with pytest.raises(UserError, match=rf"{name}.*{reason}"):
            read_picture(tmp_path / name)


def test_a_file_that_claims_a_gigantic_size_is_refused_undecoded() -> None:
    data = bytearray(encoded(Image.fromarray(RGB8), "PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match="too large"):
        decode_picture(bytes(data), "bomb.png")


def test_writing_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    write_picture(path, Picture(RGB8))
    with pytest.raises(UserError, match="exists already"):
        write_picture(path, Picture(RGB8), exist_ok=False)
    with pytest.raises(UserError, match="suffix"):
        write_picture(tmp_path / "out.gif", Picture(RGB8))
    with pytest.raises(OSError, match=r"out\.png"):
        write_picture(path / "below_a_file.png", Picture(RGB8))
    with pytest.raises(UserError, match="webp"):
        write_picture(tmp_path / "wide.webp", Picture(np.zeros((1, 20000, 3), np.uint8)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.png"]


def test_list_images_sorts_and_ignores_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        list_images(tmp_path)
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt", "c10.tif", "c9.tif"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert [path.name for path in list_images(tmp_path)] == NAMES
    with pytest.raises(UserError, match=r"gone\.png does not exist"):
        read_size(tmp_path / "gone.png")
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "none")


def test_tensors_and_back() -> None:
    for rgb, depth in ((RGB8, 8), (RGB16, 16)):
        image = to_tensor(rgb)
        assert image.shape == (3, 7, 10)
        assert image.dtype == torch.float32
        np.testing.assert_array_equal(to_array(image, depth), rgb)
    np.testing.assert_array_equal(to_8_bit(RGB8.astype(np.uint16) * 257), RGB8)
    outside = torch.tensor([-0.1, 0.5, 1.1]).reshape(3, 1, 1)
    assert to_array(outside).ravel().tolist() == [0, 128, 255]


def test_every_16_bit_sample_goes_to_the_nearest_of_8_bits() -> None:
    samples = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(to_8_bit(samples), np.rint(samples / 257))


def test_colours_divided_by_alpha_are_rounded() -> None:
    samples = [1, 2, 3, 0, 100, 7, 39999, 40000]
    picture = decode_picture(tiff(16, 2, samples, 1), "t")
    expected = np.rint(np.array([100, 7, 39999]) * 65535 / 40000)
    np.testing.assert_array_equal(picture.rgb[0, 1], expected)
