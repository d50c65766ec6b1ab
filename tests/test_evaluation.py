"""The evaluation loop: how images are prepared, patches against whole images, and what is said."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from engine.conventions import Conventions
from engine.evaluation import Evaluation, Figures, bicubic, mean_of
from engine.report import Table, to_json, write_json
from engine.restore import OriginalRestorer, Patches, PcsrRestorer, Restored
from engine.samples import EvaluationSet, ImagePaths
from models.backbones.base import SRNetwork
from models.patches import PatchCanvas
from models.pcsr import PCSR
from models.routing import AdaptiveRouting, FixedRouting, KRouting
from utils.config import DataConfig, load_config
from utils.errors import UserError
from utils.flops import PcsrCost
from utils.images import Picture, write_picture

CONFIGS = Path(__file__).parent.parent / "configs"
CPU = torch.device("cpu")


WHOLE = Conventions(scale=4.0, psnr_type="rgb", lr="bicubic float", crop=False, per_image=True)


def conventions(**changes: Any) -> Conventions:
    return dataclasses.replace(WHOLE, **changes)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    def make(name: str = "hr", **sizes: tuple[int, int]) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        for seed, (stem, size) in enumerate(sizes.items()):
            write_picture(tmp_path / name / f"{stem}.png", Picture(noise(*size, seed)))
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def original() -> SRNetwork:
    torch.manual_seed(0)
    config = load_config(CONFIGS / "tiny-x4.yaml")
    model = models.make(config.model, data_norm=config.data_norm)
    assert isinstance(model, SRNetwork)
    return model.eval()


@pytest.fixture(scope="module")
def pcsr() -> PCSR:
    torch.manual_seed(0)
    config = load_config(CONFIGS / "tiny-pcsr-phase1.yaml")
    model = models.make(config.model, data_norm=config.data_norm)
    assert isinstance(model, PCSR)
    return model.eval()


# How images are prepared


@pytest.mark.parametrize(
    ("scale", "lr_size", "hr_size"),
    [(4.0, (23, 30), (92, 120)), (3.0, (31, 41), (93, 123)), (2.7, (34, 45), (92, 122))],
)
def test_hr_is_cropped_to_the_scale(scale, lr_size, hr_size, folder) -> None:
    paths = ImagePaths.of_folders(folder(a=(94, 123)))
    sample = EvaluationSet(paths, conventions(scale=scale))[0]
    assert tuple(sample.lr.shape) == (3, *lr_size)
    assert sample.size == hr_size
    assert np.array_equal(sample.hr, noise(94, 123)[: hr_size[0], : hr_size[1]])


def test_crop_to_what_patches_tile(folder) -> None:
    paths = ImagePaths.of_folders(folder(a=(4 * 61, 4 * 59), b=(4 * 31, 4 * 88)))
    whole, cropped = (EvaluationSet(paths, conventions(crop=c)) for c in (False, True))
    assert [tuple(cropped[i].lr.shape[1:]) for i in (0, 1)] == [(60, 32), (31, 88)]
    assert cropped[0].size == (240, 128)
    # LR is made before the crop: the crop's edge is no image border.
    assert torch.equal(cropped[0].lr, whole[0].lr[:, :60, :32])


def test_gray_and_16_bit_images_become_8_bit_rgb(folder) -> None:
    gray = np.repeat(noise(48, 48)[:, :, :1], 3, axis=2)
    write_picture(folder() / "gray.png", Picture(gray.astype(np.uint16) * 257))
    sample = EvaluationSet(ImagePaths.of_folders(folder()), conventions())[0]
    assert sample.hr.dtype == np.uint8
    assert np.array_equal(sample.hr, gray)


def test_given_lr_is_paired_by_name_and_taken_as_it_is(folder) -> None:
    hr = folder("hr", b=(48, 64), a=(50, 64))
    lr = folder("lr", bx4=(12, 16), ax4=(13, 16))
    images = EvaluationSet(ImagePaths.of_folders(hr, lr), conventions(lr="given"))
    assert images.names == ["a.png", "b.png"]
    assert [images[i].size for i in (0, 1)] == [(48, 64), (48, 64)]
    expected = torch.from_numpy(noise(12, 16)).permute(2, 0, 1) / 255
    assert torch.equal(images[1].lr, expected)


@pytest.mark.parametrize(
    ("lr_size", "problem"), [((24, 16), "do not differ by scale 4"), ((13, 17), "scale 4")]
)
def test_pairs_of_another_scale_are_refused(lr_size, problem, folder) -> None:
    paths = ImagePaths.of_folders(folder("hr", a=(48, 64)), folder("lr", a=lr_size))
    with pytest.raises(UserError, match=problem):
        EvaluationSet(paths, conventions(lr="given"))


def test_too_small_an_image_is_refused_before_anything_runs(folder) -> None:
    # 9 pixels are cropped to 8, of which a border of 4 leaves nothing.
    for width in (3, 8, 9, 11):
        paths = ImagePaths.of_folders(folder(f"hr{width}", a=(48, 48), b=(60, width)))
        with pytest.raises(UserError, match=rf"b\.png is {width}x60, too small for scale 4"):
            EvaluationSet(paths, conventions())
    several = folder("several", a=(48, 48), b=(60, 3), c=(4, 4), d=(5, 5))
    with pytest.raises(UserError, match=r"b\.png is 3x60, too small .*; nor will do c.png, d.png$"):
        EvaluationSet(ImagePaths.of_folders(several), conventions())
    least = EvaluationSet(ImagePaths.of_folders(folder("hr12", b=(60, 12))), conventions())
    assert least[0].hr.shape == (60, 12, 3)


def test_images_of_the_config(folder) -> None:
    hr, lr = folder("hr", a=(48, 64), b=(48, 64)), folder("lr", a=(12, 16), b=(12, 16))
    wrapper = {"name": "sr-implicit-downsampled", "args": {}}
    single = {"name": "image-folder", "args": {"root_path": str(hr), "first_k": 1}}
    assert ImagePaths.of_config(DataConfig(single, wrapper)).hr == [hr / "a.png"]
    args = {"root_path_hr": str(hr), "root_path_lr": str(lr)}
    pairs = {"name": "paired-image-folders", "args": args}
    assert ImagePaths.of_config(DataConfig(pairs, wrapper)).lr == [lr / "a.png", lr / "b.png"]


# Patches


@pytest.mark.parametrize("lr_size", [(32, 32), (20, 32), (7, 9), (1, 1)])
@pytest.mark.parametrize("routing", [KRouting(0.0), AdaptiveRouting(), FixedRouting(-1)])
def test_one_patch_is_the_whole_image(lr_size, routing, pcsr, original) -> None:
    lr = torch.rand(3, *lr_size, generator=torch.Generator().manual_seed(1))
    size = (4 * lr_size[0], 4 * lr_size[1])
    whole, patched = (PcsrRestorer(pcsr, routing, patches=p)(lr, size) for p in (None, Patches()))
    torch.testing.assert_close(patched.sr, whole.sr)
    assert (patched.shares, patched.flops_paper) == (whole.shares, whole.flops_paper)
    first, second = (OriginalRestorer(original, p)(lr) for p in (None, Patches()))
    torch.testing.assert_close(second.sr, first.sr)
    assert second.flops_executed == first.flops_executed


def test_patches_count_overlaps(pcsr, original) -> None:
    lr = torch.rand(3, 60, 88, generator=torch.Generator().manual_seed(2))
    patched = PcsrRestorer(pcsr, FixedRouting(0), patches=Patches(batch_size=4))(lr, (240, 352))
    assert tuple(patched.sr.shape) == (3, 240, 352)
    cost, patches, pixels = PcsrCost.of(pcsr), 2 * 3, 128 * 128
    per_pixel = cost.classifier_flops + cost.upsampler_flops[0]
    assert patched.flops_paper == patches * (cost.encoder_paper((32, 32)) + pixels * per_pixel)
    assert patched.shares == [1.0, 0.0]
    one = OriginalRestorer(original)(lr[:, :32, :32])
    six = OriginalRestorer(original, Patches())(lr)
    assert six.flops_paper == patches * one.flops_paper


def test_overlaps_are_averaged(original) -> None:
    lr = torch.rand(3, 32, 60, generator=torch.Generator().manual_seed(3))
    patched = OriginalRestorer(original, Patches())(lr).sr
    left, right = (OriginalRestorer(original)(lr[:, :, x : x + 32]).sr for x in (0, 28))
    torch.testing.assert_close(patched[..., :112], left[..., :112])
    torch.testing.assert_close(patched[..., 128:], right[..., 16:])
    torch.testing.assert_close(patched[..., 112:128], (left[..., 112:] + right[..., :16]) / 2)


def test_patch_batch_size_changes_nothing(pcsr) -> None:
    lr = torch.rand(3, 60, 60, generator=torch.Generator().manual_seed(4))
    results = [
        PcsrRestorer(pcsr, AdaptiveRouting(), patches=Patches(batch_size=n))(lr, (240, 240))
        for n in (1, 3, 96)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result.sr, results[0].sr)
        assert result.shares == results[0].shares


# The loop


def test_ranges_of_images_give_the_figures_of_all(folder, pcsr) -> None:
    paths = ImagePaths.of_folders(folder(a=(48, 64), b=(64, 60), c=(52, 52)))
    images = EvaluationSet(paths, conventions(psnr_type="y"))
    restorer = PcsrRestorer(pcsr)

    def figures(indices) -> list[tuple]:
        rows = map(Evaluation(images, restorer, CPU), indices)
        return [(f.name, f.psnr, f.ssim, f.flops_paper, f.shares) for f in rows]

    assert figures(range(3)) == figures(range(0, 1)) + figures(range(1, 3))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(""),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["gpu", "python", "cpu"],
)
def test_out_of_memory_names_the_image_and_what_to_do(error: Exception, folder) -> None:
    def fail(lr: Tensor, size: tuple[int, int]) -> Restored:
        raise error

    images = EvaluationSet(ImagePaths.of_folders(folder(a=(48, 64))), conventions())
    with pytest.raises(UserError, match=r"a\.png: not enough memory.*patch_batch_size"):
        Evaluation(images, fail, CPU)(0)


def test_other_errors_of_the_device_stay_what_they_are(folder) -> None:
    def fail(lr: Tensor, size: tuple[int, int]) -> Restored:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    images = EvaluationSet(ImagePaths.of_folders(folder(a=(48, 64))), conventions())
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Evaluation(images, fail, CPU)(0)


def test_equal_and_small_images_have_no_figure_in_json(folder, tmp_path) -> None:
    images = EvaluationSet(ImagePaths.of_folders(folder(a=(18, 18))), conventions())
    hr = torch.from_numpy(images[0].hr).permute(2, 0, 1) / 255

    def perfect(lr: Tensor, size: tuple[int, int]) -> Restored:
        return Restored(hr[:, : size[0], : size[1]], None, [], 1, 1, 0.0)

    figures = [Evaluation(images, perfect, CPU)(0)]
    assert (figures[0].psnr, math.isnan(figures[0].ssim)) == (math.inf, True)
    write_json(tmp_path / "new" / "f.json", to_json(figures, []))
    written = json.loads((tmp_path / "new" / "f.json").read_text())
    assert written["images"][0]["psnr"] is None
    assert written["mean"]["ssim"] is None


def test_mean_is_over_images() -> None:
    rows = [Figures("a", 30.0, 0.75, 10, 8, [0.25, 0.75], 1.0)]
    rows += [Figures("b", 20.0, 0.25, 30, 24, [0.75, 0.25], 3.0)]
    assert mean_of(rows) == Figures("mean", 25.0, 0.5, 20, 16, [0.5, 0.5], 2.0)


def test_bicubic_keeps_a_constant_image() -> None:
    sr = bicubic(torch.full((3, 5, 7), 0.5), (13, 20)).sr
    torch.testing.assert_close(sr, torch.full((3, 13, 20), 0.5))


@pytest.mark.parametrize("upsamplers", [0, 1, 2, 3])
def test_table_is_aligned(upsamplers) -> None:
    lines: list[str] = []
    table = Table(["a_rather_long_name.png"], upsamplers, lines.append)
    table.header()
    table.row(Figures("a.png", 30.0, math.nan, 1e12, 1e9, [1 / 3] * upsamplers, 100.0))
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split()[:3] == ["a.png", "30.000", "-"]


def test_of_overlapping_patches_the_larger_class_is_shown() -> None:
    canvas = PatchCanvas((1, 3), torch.zeros(1))
    for left, index in ((0, 1), (1, 0)):
        classes = torch.full((1, 2), index, dtype=torch.uint8)
        canvas.add((0, left), torch.zeros(3, 1, 2), classes)
    assert canvas.classes.tolist() == [[1, 1, 0]]
