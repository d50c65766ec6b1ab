"""demo.py --upscale: pictures of every kind, and nothing lost on the way."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from engine.demo.enlarge import Enlarger
from engine.picture_files import result_stems
from tests.demo_models import Demo
from tests.processes import REPOSITORY, needs_name
from utils.errors import UserError
from utils.images import Picture, read_picture, read_rgb, write_picture
from utils.transparency import fill_transparent

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize(
    ("words", "tag"), [(["--scale", "2.7"], "x2.7"), (["--size", "9x5"], "9x5")]
)
def test_result_sizes(
    tmp_path: Path, demo_weights: dict[str, Path], demo: Demo, words: list[str], tag: str
) -> None:
    """Single pixels, lines and constant pictures included."""
    shapes = [(1, 1), (1, 7), (6, 1), (3, 3), (10, 13)]
    for h, w in shapes:
        write_picture(tmp_path / "in" / f"{h}_{w}.png", Picture(np.full((h, w, 3), 90, np.uint8)))
    code = demo(
        *("--img_path", tmp_path / "in", "--out_dir", tmp_path / "out", "--upscale", *words),
        *("--weights", demo_weights["bilinear"], "--class_map"),
    )
    assert code == 0
    for h, w in shapes:
        size = (5, 9) if tag == "9x5" else (round(h * 2.7), round(w * 2.7))
        result = read_rgb(tmp_path / "out" / f"{h}_{w}_{tag}.png")
        assert result.shape == (*size, 3)
        assert (result == 90).all()
        assert read_rgb(tmp_path / "out" / f"{h}_{w}_{tag}_classes.png").shape == (*size, 3)


def test_picture_kinds_survive(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    alpha = np.zeros(photo.shape[:2], np.uint8)
    alpha[20:60, 30:80] = 255
    deep = photo.astype(np.uint16) * 257
    write_picture(
        folder / "alpha.png", Picture(np.full_like(photo, 255) * (alpha > 0)[..., None], alpha)
    )
    write_picture(folder / "deep.png", Picture(deep, alpha.astype(np.uint16) * 257, SRGB))
    write_picture(folder / "deep.tiff", Picture(deep))
    image = Image.fromarray(photo)
    image.convert("L").save(folder / "gray.png")
    image.quantize(16).save(folder / "palette.png")
    image.save(folder / "profile.webp", icc_profile=SRGB)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned, quality=95)
    words = ("--upscale", "--scale", 2, "--weights", demo_weights["bilinear"])
    assert demo("--img_path", folder, "--out_dir", out, *words) == 0

    height, width = 2 * photo.shape[0], 2 * photo.shape[1]
    results = {path.name: read_picture(path) for path in out.iterdir()}
    assert sorted(results) == [
        *("alpha_x2.png", "deep_png_x2.png", "deep_tiff_x2.tiff", "gray_x2.png"),
        *("palette_x2.png", "profile_x2.webp", "turned_x2.jpg"),
    ]
    for name, result in results.items():
        size = (width, height) if name == "turned_x2.jpg" else (height, width)
        assert (result.height, result.width) == size, name
        assert result.bit_depth == (16 if "deep" in name else 8)
        assert (result.alpha is not None) == (name in ("alpha_x2.png", "deep_png_x2.png"))
        assert (result.icc_profile == SRGB) == (name in ("deep_png_x2.png", "profile_x2.webp"))
    gray = results["gray_x2.png"].rgb
    assert (gray[..., :1] == gray).all()
    # Not 8-bit samples in a 16-bit file.
    assert (results["deep_tiff_x2.tiff"].rgb % 257 != 0).any()
    # White on transparent black: no dark fringe.
    white = results["alpha_x2.png"]
    assert white.alpha is not None
    assert (white.rgb[white.alpha > 0] == 255).all()
    # All of them show the same photograph, upright.
    upright = results["deep_tiff_x2.tiff"].rgb / 257.0
    for name in ("palette_x2.png", "profile_x2.webp"):
        assert np.abs(results[name].rgb - upright).mean() < 8, name
    assert np.abs(np.rot90(results["turned_x2.jpg"].rgb) - upright).mean() < 8


def test_nothing_is_overwritten(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    """Results beside the originals get free names; elsewhere a second run replaces its results."""
    small = photo[:6, :6]
    inputs = [tmp_path / name for name in ("a.png", "a.jpg", "a_png_x2.png")]
    for path in inputs:
        write_picture(path, Picture(small))
    before = {path: path.read_bytes() for path in inputs}
    words = ("--upscale", "--scale", 2, "--weights", demo_weights["two"])
    assert demo("--img_path", tmp_path, "--out_dir", tmp_path, *words) == 0
    assert {path: path.read_bytes() for path in inputs} == before
    made = sorted(path.name for path in tmp_path.iterdir() if path not in inputs)
    assert made == ["a_jpg_x2.jpg", "a_png_x2_2.png", "a_png_x2_x2.png"]

    for _ in range(2):
        assert demo("--img_path", inputs[0], "--out_dir", tmp_path / "out", *words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x2.png"]


def test_names_of_results() -> None:
    paths = [Path(name) for name in ("A.png", "a.PNG", "a.png", "a_png.jpg", "b.png", "c")]
    stems = list(result_stems(paths).values())
    assert stems[3:] == ["a_png", "b", "c"]
    assert len({stem.casefold() for stem in stems}) == len(paths)


def test_of_several_pictures_in_a_file_the_first_is_taken_and_that_is_told(
    tmp_path: Path,
    demo_weights: dict[str, Path],
    photo: np.ndarray,
    demo: Demo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (Image.fromarray(photo[y : y + 8, :8]) for y in (0, 8))
    for name in ("pages.tif", "animated.png", "animated.webp"):
        path = tmp_path / name
        first.save(path, save_all=True, append_images=[second], lossless=True)
        words = (
            "--img_path",
            path,
            "--upscale",
            "--weights",
            demo_weights["two"],
            "--format",
            "png",
        )
        assert demo(*words, "--out_dir", tmp_path / "out") == 0
        assert f"{path} holds 2 pictures: the first is taken" in capsys.readouterr().err
        np.testing.assert_array_equal(read_rgb(path), photo[:8, :8])
        assert read_rgb(tmp_path / "out" / f"{path.stem}_x4.png").shape == (32, 32, 3)


def test_a_damaged_second_page_keeps_nobody_from_the_first(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    path = tmp_path / "pages.tif"
    first, second = (Image.fromarray(photo[y : y + 8, :8]) for y in (0, 8))
    first.save(path, save_all=True, append_images=[second])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 150])
    words = ("--img_path", path, "--upscale", "--weights", demo_weights["two"])
    assert demo(*words, "--out_dir", tmp_path / "out") == 0
    assert (tmp_path / "out" / "pages_x4.tif").is_file()


def test_a_lack_of_memory_names_the_picture_and_the_rest_is_done(
    tmp_path: Path,
    demo_weights: dict[str, Path],
    photo: np.ndarray,
    demo: Demo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b"):
        write_picture(tmp_path / "in" / f"{name}.png", Picture(photo[:8, :8]))

    def read(path: Path) -> Picture:
        if path.name == "a.png":
            raise MemoryError
        return read_picture(path)

    monkeypatch.setattr("engine.demo.jobs.read_picture", read)
    words = ("--img_path", tmp_path / "in", "--upscale", "--weights", demo_weights["two"])
    assert demo(*words, "--out_dir", tmp_path / "out") == 2
    assert "a.png: not enough memory; cut it into parts" in capsys.readouterr().err
    assert (tmp_path / "out" / "b_x4.png").is_file()


def test_folder_goes_on_after_a_bad_file(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray
) -> None:
    """As a user runs it: exit code 2, the rest done, reasons last, no traceback."""
    write_picture(tmp_path / "in" / "good.png", Picture(photo[:8, :8]))
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:120])
    (tmp_path / "in" / "text.png").write_text("no picture")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere")
    command = [sys.executable, "demo.py", "--upscale", "--device", "cpu"]
    command += ["--img_path", str(tmp_path / "in"), "--out_dir", str(tmp_path / "out")]
    command += ["--weights", str(demo_weights["two"])]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (tmp_path / "out" / "good_x4.png").is_file()
    assert str(tmp_path / "out") in ended.stdout.splitlines()[-1]
    *_, count, cut, gone, text = ended.stderr.splitlines()
    assert count == "3 of 4 pictures failed:"
    assert "gone.png does not exist" in gone
    assert "cut.png" in cut
    assert "text.png" in text
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("words", [["--upscale", "--scale", "100000"], ["--upscale"], []])
def test_what_is_refused_leaves_no_folder(
    words: list[str],
    tmp_path: Path,
    demo_weights: dict[str, Path],
    demo: Demo,
    photo: np.ndarray,
) -> None:
    picture = tmp_path / "a.png"
    write_picture(picture, Picture(photo[:48, :48]))
    if "--scale" not in words:
        picture.write_bytes(picture.read_bytes()[:999])
    out = tmp_path / "new" / "out"
    code = demo(
        *("--img_path", picture, "--out_dir", out, "--weights", demo_weights["two"], *words),
    )
    assert code == 2
    assert not out.parent.exists()


@pytest.mark.parametrize("words", [["--upscale"], []])
def test_names_that_cannot_be_shown_are_escaped(
    words: list[str], tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray
) -> None:
    """Of a terminal without such characters, and of no encoding at all."""
    needs_name(tmp_path / os.fsdecode(b"caf\xe9.png"))
    for name in (b"\xe6\x97\xa5.png", b"caf\xe9.png"):
        write_picture(tmp_path / "in" / "new.png", Picture(photo[:48, :48]))
        (tmp_path / "in" / "new.png").rename(tmp_path / "in" / os.fsdecode(name))
    command = [sys.executable, "demo.py", "--device", "cpu", *words]
    command += ["--img_path", str(tmp_path / "in"), "--out_dir", str(tmp_path / "out")]
    command += ["--weights", str(demo_weights["two"])]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=ascii_only)
    assert ended.returncode == 0, ended.stderr
    assert "\\u65e5" in ended.stdout and "caf\\udce9" in ended.stdout
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(files) == (2 if words else 12)


def test_what_the_network_itself_computes_has_a_limit() -> None:
    enlarger = Enlarger(lambda lr, size: pytest.fail("it has to be refused"), 1e6)
    with pytest.raises(UserError, match="x1e\\+06, more than"):
        enlarger(torch.rand(3, 8, 8), (8, 8))


def test_transparent_pixels_continue_what_is_visible() -> None:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.rand(3, 13, 10, generator=generator) * 0.2 + 0.4
    alpha = (torch.rand(13, 10, generator=generator) > 0.8).float()
    hidden = torch.where(alpha > 0, rgb, 0.0)
    filled = fill_transparent(hidden, alpha)
    assert torch.equal(torch.where(alpha > 0, filled, 0.0), hidden)
    assert 0.4 <= filled.min() <= filled.max() <= 0.6
    assert torch.equal(fill_transparent(rgb, torch.ones(13, 10)), rgb)
    assert not fill_transparent(rgb, torch.zeros(13, 10)).any()


def test_gray_stays_gray_where_the_network_would_colour_it(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    Image.fromarray(photo[:20, :20]).convert("L").save(tmp_path / "gray.png")
    words = ("--upscale", "--weights", demo_weights["two"], "--out_dir", tmp_path / "out")
    assert demo("--img_path", tmp_path / "gray.png", *words) == 0
    result = read_rgb(tmp_path / "out" / "gray_x4.png")
    assert (result == result[..., :1]).all()
