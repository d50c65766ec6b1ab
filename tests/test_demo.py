"""demo.py: the published comparison, and words that are refused.

Models are small and random, so figures are only compared with each other; the official ones are
checked where they are at hand.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from datasets.resize import imresize
from engine.conventions import Conventions
from engine.demo.enlarge import Enlarger
from engine.demo.models import load_demo_pcsr
from engine.demo.report import comparison_table
from engine.evaluation import Figures
from engine.loading import load_original, load_pcsr
from engine.restore import OriginalRestorer, PcsrRestorer, Restored
from engine.samples import EvaluationSet, ImagePaths
from engine.self_ensemble import SelfEnsemble
from models.routing import AdaptiveRouting, KRouting
from tests.demo_models import SPECS, Demo
from tests.processes import REPOSITORY
from utils.checkpoint import save_checkpoint
from utils.colour import class_colours
from utils.images import Picture, read_rgb, to_tensor, write_picture
from utils.metrics import psnr, quantise

CPU = torch.device("cpu")
FIVE_PICTURES = ["HR.png", "LRx4.png", "Original.png", "PCSR.png", "PCSR_colored.png"]


@pytest.mark.parametrize("words", [[], ["--adaptive", "--no_refinement"]])
def test_comparison_as_published(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo, words: list[str]
) -> None:
    write_picture(tmp_path / "p.png", Picture(photo))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    code = demo(
        *("--img_path", tmp_path / "p.png", "--out_dir", tmp_path / "out", "--k", 0, *words),
        *("--weights", demo_weights["two"], "--original_weights", demo_weights["original"]),
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
        load_pcsr(demo_weights["two"], CPU),
        AdaptiveRouting() if words else KRouting(0.0),
        refinement=not words,
    )(lr, (80, 108))
    sr = read_rgb(tmp_path / "out" / "PCSR.png")
    np.testing.assert_array_equal(sr, quantise(expected.sr))
    original = quantise(load_original(demo_weights["original"], CPU)(lr[None])[0].detach())
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


def test_self_ensemble_runs_both_networks_on_turned_copies(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    write_picture(tmp_path / "p.png", Picture(photo[:41, :34]))
    words = ("--img_path", tmp_path / "p.png", "--self_ensemble", "--weights", demo_weights["two"])
    compared = ("--original_weights", demo_weights["original"], "--json", tmp_path / "d.json")
    assert demo(*words, *compared, "--out_dir", tmp_path / "compared") == 0
    lr = imresize(to_tensor(read_rgb(tmp_path / "compared" / "HR.png")), scale=0.25)
    ours = PcsrRestorer(load_pcsr(demo_weights["two"], CPU))
    theirs = OriginalRestorer(load_original(demo_weights["original"], CPU))
    for name, restore in (("PCSR", ours), ("Original", theirs)):
        expected = quantise(SelfEnsemble(restore)(lr, (40, 32)).sr)
        np.testing.assert_array_equal(read_rgb(tmp_path / "compared" / f"{name}.png"), expected)
    assert json.loads((tmp_path / "d.json").read_text())["conventions"]["self_ensemble"] is True
    assert "self-ensemble of 8" in (tmp_path / "compared" / "log.txt").read_text()

    assert demo(*words, "--upscale", "--out_dir", tmp_path / "larger") == 0
    whole = SelfEnsemble(ours)(to_tensor(photo[:41, :34]), (164, 136)).sr
    np.testing.assert_array_equal(read_rgb(tmp_path / "larger" / "p_x4.png"), quantise(whole))


def test_folder_of_photographs(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    """No original at this scale; two files of one stem; a picture too small for the border."""
    folder = tmp_path / "in"
    for name, rgb in {"a.png": photo, "a.jpg": photo, "tiny.png": photo[:4, :5]}.items():
        write_picture(folder / name, Picture(rgb))
    code = demo(
        *("--img_path", folder, "--out_dir", tmp_path, "--json", tmp_path / "d.json"),
        *("--weights", demo_weights["two"], "--original_weights", demo_weights["original"]),
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


def test_comparison_never_replaces_its_input(
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    write_picture(tmp_path / "HR.png", Picture(photo))
    before = (tmp_path / "HR.png").read_bytes()
    words = ("--img_path", tmp_path / "HR.png", "--weights", demo_weights["two"])
    assert demo(*words, "--out_dir", tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["HR.png"]
    assert (tmp_path / "HR.png").read_bytes() == before
    assert demo(*words, "--out_dir", tmp_path / "out", "--json", tmp_path / "HR.png") == 2
    assert (tmp_path / "HR.png").read_bytes() == before


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
    demo_weights: dict[str, Path],
    photo: np.ndarray,
    demo: Demo,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    path = tmp_path / "p.png"
    write_picture(path, Picture(photo[:33, :34]))
    folder = str(demo_weights["two"].parent)
    given = [word.replace("WEIGHTS", folder).replace("PHOTO", str(path)) for word in words]
    common = ("--img_path", path, "--out_dir", tmp_path / "out", "--weights", demo_weights["two"])
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
    tmp_path: Path, demo_weights: dict[str, Path], photo: np.ndarray, demo: Demo
) -> None:
    assert class_colours(3).tolist() == [[0, 255, 0], [255, 255, 0], [255, 0, 0]]
    write_picture(tmp_path / "p.png", Picture(photo[:40, :40]))
    words = ("--img_path", tmp_path / "p.png", "--out_dir", tmp_path / "out")
    assert demo(*words, "--weights", demo_weights["three"], "--opacity", 0, "--upsampler", 1) == 0
    colored = read_rgb(tmp_path / "out" / "PCSR_colored.png")
    assert (colored == [255, 255, 0]).all()


def test_other_scales_go_through_the_trained_one(demo_weights: dict[str, Path]) -> None:
    restorer = PcsrRestorer(load_pcsr(demo_weights["two"], CPU))
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


def test_flops_are_compared_with_the_originals_of_the_same_kind() -> None:
    original = Figures("a.png", 30.0, 0.9, 4e9, 1e9, [], 1.0)
    text = comparison_table(original, replace(original, flops_paper=1e9, flops_executed=5e8))
    assert "1.00G (25.0%)" in text and "0.50G (50.0%)" in text


def test_a_smaller_size_is_made_of_clamped_pixels_and_of_classes_in_the_middle() -> None:
    classes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 8)

    def stub(lr: torch.Tensor, size: tuple[int, int]) -> Restored:
        return Restored(torch.full((3, *size), 3.0), classes, [1.0], 0, 0, 0.0)

    restored = Enlarger(stub)(torch.rand(3, 2, 2), (2, 2))
    assert restored.classes is not None and restored.classes[:, 0].tolist() == [2, 6]
    torch.testing.assert_close(restored.sr, torch.ones(3, 2, 2))
