"""demo.py: the published comparison, enlarging pictures of every kind, and nothing lost on the way.

Models are small and random, so figures are only compared with each other; the official ones are
checked where they are at hand.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import models
from datasets.resize import imresize
from engine.conventions import Conventions
from engine.demo.cli import main
from engine.demo.enlarge import Enlarger
from engine.demo.models import load_demo_pcsr
from engine.demo.words import make_parser
from engine.loading import load_original, load_pcsr
from engine.picture_files import result_stems
from engine.restore import PcsrRestorer
from engine.samples import EvaluationSet, ImagePaths
from models.pcsr import PCSR
from models.routing import AdaptiveRouting, KRouting
from utils.checkpoint import save_checkpoint
from utils.cli import run
from utils.colour import class_colours
from utils.images import Picture, read_picture, read_rgb, to_tensor, write_picture
from utils.metrics import psnr, quantise
from utils.transparency import fill_transparent

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FIVE_PICTURES = ["HR.png", "LRx4.png", "Original.png", "PCSR.png", "PCSR_colored.png"]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _sampler(*hidden: int) -> dict[str, Any]:
    mlp = {"name": "mlp", "args": {"hidden_list": list(hidden)}}
    return {"name": "liif-sampler", "args": {"imnet_spec": mlp}}


ENCODER = {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "no_upsampling": True}}
SPECS: dict[str, dict[str, Any]] = {
    "original": {"name": "fsrcnn", "args": {"d": 8, "s": 4, "m": 1, "upscale": 4}},
    "two": {
        "name": "pcsr-phase1",
        "args": {
            "encoder_spec": ENCODER,
            "heavy_sampler_spec": _sampler(8, 8),
            "light_sampler_spec": _sampler(4),
            "classifier_spec": _sampler(),
        },
    },
    "three": {
        "name": "pcsr",
        "args": {
            "encoder_spec": ENCODER,
            "upsampler_specs": [_sampler(4), _sampler(8), _sampler(8, 8)],
            "classifier_spec": _sampler(),
        },
    },
}


def save_model(path: Path, spec: dict[str, Any], *, residual: bool = True) -> Path:
    """A checkpoint with random weights; without `residual` the model is bilinear enlargement."""
    torch.manual_seed(1)
    model = models.make(spec)
    state = model.state_dict()
    if not residual:
        assert isinstance(model, PCSR)
        for upsampler in model.upsamplers:
            last = list(upsampler.parameters())[-2:]
            for parameter in last:
                torch.nn.init.zeros_(parameter)
    save_checkpoint(path, {"model": {**spec, "sd": state}, "iter": 1})
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: save_model(folder / f"{name}.pth", spec) for name, spec in SPECS.items()}
    return {**paths, "bilinear": save_model(folder / "b.pth", SPECS["two"], residual=False)}


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(83, 110, 3) uint8, sides that 4 does not divide."""
    return read_rgb(REPOSITORY / "examples" / "chelsea.png")[100:183, 120:230].copy()


Demo = Callable[..., int]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Demo]:
    """Run demo.py's command line in this process; returns the exit code."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["demo.py", "--device", "cpu", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run(lambda: main(make_parser()))
        return int(ended.value.code or 0)

    yield call


@pytest.mark.parametrize("words", [[], ["--adaptive", "--no_refinement"]])
def test_comparison_as_published(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo, words: list[str]
) -> None:
    write_picture(tmp_path / "p.png", Picture(photo))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    code = demo(
        *("--img_path", tmp_path / "p.png", "--out_dir", tmp_path / "out", "--k", 0, *words),
        *("--weights", weights["two"], "--original_weights", weights["original"]),
        *("--json", tmp_path / "d.json"),
    )
    assert code == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*FIVE_PICTURES, "log.txt", "mine.txt"])

    hr = photo[1:81, 1:109]
    np.testing.assert_array_equal(read_rgb(tmp_path / "out" / "HR.png"), hr)
    lr = imresize(to_tensor(hr), scale=0.25)
    np.testing.assert_array_equal(read_rgb(tmp_path / "out" / "LRx4.png"), quantise(lr))
    expected = PcsrRestorer(
        load_pcsr(weights["two"], CPU),
        AdaptiveRouting() if words else KRouting(0.0),
        refinement=not words,
    )(lr, (80, 108))
    sr = read_rgb(tmp_path / "out" / "PCSR.png")
    np.testing.assert_array_equal(sr, quantise(expected.sr))
    original = quantise(load_original(weights["original"], CPU)(lr[None])[0].detach())
    np.testing.assert_array_equal(read_rgb(tmp_path / "out" / "Original.png"), original)

    content = json.loads((tmp_path / "d.json").read_text())
    figures = content["images"][0]["pcsr"]
    assert figures["psnr"] == psnr(sr, hr, psnr_type="rgb", border_px=4)
    assert figures["flops_paper"] == expected.flops_paper
    assert figures["shares"] == expected.shares
    assert content["mean"]["original"]["psnr"] == content["images"][0]["original"]["psnr"]
    assert content["conventions"]["refinement"] is not bool(words)
    assert f"{figures['psnr']:.2f} dB" in (tmp_path / "out" / "log.txt").read_text()

    assert expected.classes is not None
    classes = expected.classes.numpy()
    blended = sr * 0.65 + np.array([[0, 255, 0], [255, 0, 0]])[classes] * 0.35
    colored = read_rgb(tmp_path / "out" / "PCSR_colored.png")
    assert np.abs(colored - blended).max() <= 0.5 + 1e-9


def test_folder_of_photographs(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    """No original at this scale; two files of one stem; a picture too small for the border."""
    folder = tmp_path / "in"
    for name, rgb in {"a.png": photo, "a.jpg": photo, "tiny.png": photo[:4, :5]}.items():
        write_picture(folder / name, Picture(rgb))
    code = demo(
        *("--img_path", folder, "--out_dir", tmp_path, "--json", tmp_path / "d.json"),
        *("--weights", weights["two"], "--original_weights", weights["original"]),
        *("--scale", 2.5, "--model_scale", "any"),
    )
    assert code == 2
    for name in ("a_png", "a_jpg"):
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == ["HR.png", "LRx2.5.png", "PCSR.png", "PCSR_colored.png", "log.txt"]
        assert read_rgb(tmp_path / name / "HR.png").shape == (82, 110, 3)
    content = json.loads((tmp_path / "d.json").read_text())
    assert [failure["name"] for failure in content["failures"]] == ["tiny.png"]
    assert content["images"][0]["original"] is None
    assert "x4" in (tmp_path / "a_png" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("words", "tag"), [(["--scale", "2.7"], "x2.7"), (["--size", "9x5"], "9x5")]
)
def test_result_sizes(
    tmp_path: Path, weights: dict[str, Path], demo: Demo, words: list[str], tag: str
) -> None:
    """Single pixels, lines and constant pictures included."""
    shapes = [(1, 1), (1, 7), (6, 1), (3, 3), (10, 13)]
    for h, w in shapes:
        write_picture(tmp_path / "in" / f"{h}_{w}.png", Picture(np.full((h, w, 3), 90, np.uint8)))
    code = demo(
        *("--img_path", tmp_path / "in", "--out_dir", tmp_path / "out", "--upscale", *words),
        *("--weights", weights["bilinear"], "--class_map"),
    )
    assert code == 0
    for h, w in shapes:
        size = (5, 9) if tag == "9x5" else (round(h * 2.7), round(w * 2.7))
        result = read_rgb(tmp_path / "out" / f"{h}_{w}_{tag}.png")
        assert result.shape == (*size, 3)
        assert (result == 90).all()
        assert read_rgb(tmp_path / "out" / f"{h}_{w}_{tag}_classes.png").shape == (*size, 3)


def test_picture_kinds_survive(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
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
    words = ("--upscale", "--scale", 2, "--weights", weights["bilinear"])
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
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    """Results beside the originals get free names; elsewhere a second run replaces its results."""
    small = photo[:6, :6]
    inputs = [tmp_path / name for name in ("a.png", "a.jpg", "a_png_x2.png")]
    for path in inputs:
        write_picture(path, Picture(small))
    before = {path: path.read_bytes() for path in inputs}
    words = ("--upscale", "--scale", 2, "--weights", weights["two"])
    assert demo("--img_path", tmp_path, "--out_dir", tmp_path, *words) == 0
    assert {path: path.read_bytes() for path in inputs} == before
    made = sorted(path.name for path in tmp_path.iterdir() if path not in inputs)
    assert made == ["a_jpg_x2.jpg", "a_png_x2_2.png", "a_png_x2_x2.png"]

    for _ in range(2):
        assert demo("--img_path", inputs[0], "--out_dir", tmp_path / "out", *words) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a_x2.png"]


def test_comparison_never_replaces_its_input(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    write_picture(tmp_path / "HR.png", Picture(photo))
    before = (tmp_path / "HR.png").read_bytes()
    words = ("--img_path", tmp_path / "HR.png", "--weights", weights["two"])
    assert demo(*words, "--out_dir", tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["HR.png"]
    assert (tmp_path / "HR.png").read_bytes() == before
    assert demo(*words, "--out_dir", tmp_path / "out", "--json", tmp_path / "HR.png") == 2
    assert (tmp_path / "HR.png").read_bytes() == before


def test_names_of_results() -> None:
    paths = [Path(name) for name in ("A.png", "a.PNG", "a.png", "a_png.jpg", "b.png", "c")]
    stems = list(result_stems(paths).values())
    assert stems[3:] == ["a_png", "b", "c"]
    assert len({stem.casefold() for stem in stems}) == len(paths)


def test_of_several_pictures_in_a_file_the_first_is_taken_and_that_is_told(
    tmp_path: Path,
    weights: dict[str, Path],
    photo: np.ndarray,
    demo: Demo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = (Image.fromarray(photo[y : y + 8, :8]) for y in (0, 8))
    for name in ("pages.tif", "animated.png", "animated.webp"):
        path = tmp_path / name
        first.save(path, save_all=True, append_images=[second], lossless=True)
        words = ("--img_path", path, "--upscale", "--weights", weights["two"], "--format", "png")
        assert demo(*words, "--out_dir", tmp_path / "out") == 0
        assert f"{path} holds 2 pictures: the first is taken" in capsys.readouterr().err
        np.testing.assert_array_equal(read_rgb(path), photo[:8, :8])
        assert read_rgb(tmp_path / "out" / f"{path.stem}_x4.png").shape == (32, 32, 3)


def test_a_damaged_second_page_keeps_nobody_from_the_first(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    path = tmp_path / "pages.tif"
    first, second = (Image.fromarray(photo[y : y + 8, :8]) for y in (0, 8))
    first.save(path, save_all=True, append_images=[second])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 150])
    words = ("--img_path", path, "--upscale", "--weights", weights["two"])
    assert demo(*words, "--out_dir", tmp_path / "out") == 0
    assert (tmp_path / "out" / "pages_x4.tif").is_file()


def test_a_lack_of_memory_names_the_picture_and_the_rest_is_done(
    tmp_path: Path,
    weights: dict[str, Path],
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
    words = ("--img_path", tmp_path / "in", "--upscale", "--weights", weights["two"])
    assert demo(*words, "--out_dir", tmp_path / "out") == 2
    assert "a.png: not enough memory; cut it into parts" in capsys.readouterr().err
    assert (tmp_path / "out" / "b_x4.png").is_file()


def test_folder_goes_on_after_a_bad_file(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray
) -> None:
    """As a user runs it: exit code 2, the rest done, reasons last, no traceback."""
    write_picture(tmp_path / "in" / "good.png", Picture(photo[:8, :8]))
    (tmp_path / "in" / "cut.png").write_bytes((tmp_path / "in" / "good.png").read_bytes()[:120])
    (tmp_path / "in" / "text.png").write_text("no picture")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere")
    command = [sys.executable, "demo.py", "--upscale", "--device", "cpu"]
    command += ["--img_path", str(tmp_path / "in"), "--out_dir", str(tmp_path / "out")]
    command += ["--weights", str(weights["two"])]
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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--img_path", "nowhere.png"], "nowhere.png does not exist"),
        (["--k", "nan"], "--k: expected a finite number"),
        (["--upscale", "--size", "0x5"], "--size: expected width x height"),
        (["--upscale", "--scale", "nan"], "--scale: expected a number above 0"),
        (["--upscale", "--scale", "1e9"], "choose a smaller --scale"),
        (["--upscale", "--size", "70000x20", "--format", "jpg"], "use --format png"),
        (["--scale", "0.5"], "--scale 0.5: without --upscale it starts at 1"),
        (["--size", "9x9"], "--size goes with --upscale"),
        (["--upscale", "--original_weights", "a.pth"], "goes without --upscale"),
        (["--opacity", "1.5"], "--opacity: expected a number from 0 to 1"),
        (["--upscale", "--opacity", "0.5"], "with --upscale it takes --class_map"),
        (["--weights", "WEIGHTS/original.pth"], "is not a PCSR model"),
        (["--weights", "WEIGHTS/three.pth", "--adaptive"], "this model has 3: use --k"),
        (["--original_weights", "WEIGHTS/two.pth"], "is not an original"),
        (["--original_weights", "WEIGHTS/none.pth"], "none.pth does not exist"),
        (["--config", "configs/carn-pcsr-phase1.yaml"], "is of another model"),
        (["--out_dir", "PHOTO"], "is a file, not a folder"),
        (["--device", "cuda:99"], "asked for, but"),
    ],
)
def test_wrong_words_end_in_one_line(
    tmp_path: Path,
    weights: dict[str, Path],
    photo: np.ndarray,
    demo: Demo,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    path = tmp_path / "p.png"
    write_picture(path, Picture(photo[:33, :34]))
    folder = str(weights["two"].parent)
    given = [word.replace("WEIGHTS", folder).replace("PHOTO", str(path)) for word in words]
    common = ("--img_path", path, "--out_dir", tmp_path / "out", "--weights", weights["two"])
    assert demo(*common, *given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert expected in lines[-1]
    assert not list((tmp_path / "out").glob("*"))


def test_missing_default_weights_say_what_to_do(
    tmp_path: Path, demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    assert demo("--img_path", REPOSITORY / "examples" / "chelsea.png") == 2
    error = capsys.readouterr().err
    assert "no weights in save/carn-pcsr-phase1" in error
    assert "--weights" in error


def test_normalisation_follows_the_checkpoint(tmp_path: Path) -> None:
    """A published FSRCNN checkpoint holds no mean: it must not get that of the default config."""
    state = models.make(SPECS["two"]).state_dict()
    published = {key: value for key, value in state.items() if not key.startswith("norm.")}
    path = tmp_path / "published.pth"
    save_checkpoint(path, {"model": {**SPECS["two"], "sd": published}})
    loaded = load_demo_pcsr(path, None, [], CPU)
    assert loaded.backbone == "fsrcnn"
    assert not loaded.model.norm.mean.any()
    # A config that is named beside it decides.
    config = tmp_path / "c.yaml"
    norm = {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}
    config.write_text(json.dumps({"model": SPECS["two"], "data_norm": norm}))
    assert load_demo_pcsr(path, config, [], CPU).model.norm.mean.mean() == 0.5


def test_three_upsamplers_have_three_colours(
    tmp_path: Path, weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    assert class_colours(3).tolist() == [[0, 255, 0], [255, 255, 0], [255, 0, 0]]
    write_picture(tmp_path / "p.png", Picture(photo[:40, :40]))
    words = ("--img_path", tmp_path / "p.png", "--out_dir", tmp_path / "out")
    assert demo(*words, "--weights", weights["three"], "--opacity", 0, "--upsampler", 1) == 0
    colored = read_rgb(tmp_path / "out" / "PCSR_colored.png")
    assert (colored == [255, 255, 0]).all()


def test_other_scales_go_through_the_trained_one(weights: dict[str, Path]) -> None:
    restorer = PcsrRestorer(load_pcsr(weights["two"], CPU))
    lr = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))
    at_4 = restorer(lr, (36, 28))
    assert torch.equal(Enlarger(restorer)(lr, (36, 28)).sr, at_4.sr)
    assert torch.equal(
        Enlarger(restorer)(lr, (20, 21)).sr, imresize(at_4.sr.clamp(0, 1), size=(20, 21))
    )
    classes = Enlarger(restorer)(lr, (20, 21)).classes
    assert classes is not None
    assert classes.shape == (20, 21)
    assert torch.equal(Enlarger(restorer, None)(lr, (20, 21)).sr, restorer(lr, (20, 21)).sr)


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


@pytest.mark.golden
def test_official_figures(tmp_path: Path, shared: Path, demo: Demo) -> None:
    """Images cropped as the official figures were, so that the demo crops nothing more."""
    conventions = Conventions(
        scale=4.0, psnr_type="rgb", lr="bicubic float", crop=True, per_image=True
    )
    paths = ImagePaths.of_folders(shared / "data" / "test" / "Set5" / "HR")
    images = EvaluationSet(ImagePaths(paths.hr[-2:]), conventions)
    for index in range(len(images)):
        write_picture(tmp_path / "in" / images.names[index], Picture(images[index].hr))
    published = shared / "published"
    code = demo(
        *("--img_path", tmp_path / "in", "--out_dir", tmp_path / "out", "--k", 0),
        *("--json", tmp_path / "d.json", "--weights", published / "carn-pcsr-phase1.pth"),
        *("--original_weights", published / "carn-x4.pth"),
    )
    assert code == 0
    expected = json.loads((published / "expected.json").read_text())["Set5"]["images"]
    for image in json.loads((tmp_path / "d.json").read_text())["images"]:
        for model, row in (("original", "original"), ("pcsr", "k0")):
            figures, (quality, *_, giga) = image[model], expected[image["name"]][row]
            assert abs(figures["psnr"] - quality) < 0.005
            assert abs(figures["flops_paper"] / giga / 1e9 - 1) < 1e-3
