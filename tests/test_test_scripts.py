"""test.py and test_pcsr.py from the command line: table, JSON, and one line for every mistake."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from utils.checkpoint import save_checkpoint
from utils.config import load_config
from utils.images import Picture, list_images, read_rgb, write_picture

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
IMAGE_KEYS = ["name", "psnr", "ssim", "flops_paper", "flops_executed", "shares", "time_s"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two small crops in hr/ with their LR in lr/, and untrained checkpoints."""
    folder = tmp_path_factory.mktemp("evaluation")
    for name in ("hr", "lr"):
        (folder / name).mkdir()
    for path, (height, width) in zip(
        list_images(REPOSITORY / "datasets/tiny/valid"), ((130, 248), (140, 131)), strict=True
    ):
        crop = read_rgb(path)[:height, :width]
        write_picture(folder / "hr" / path.name, Picture(crop))
        small = np.ascontiguousarray(crop[: height // 4 * 4 : 4, : width // 4 * 4 : 4])
        write_picture(folder / "lr" / f"{path.stem}x4.png", Picture(small))
    for name in ("tiny-x4", "tiny-pcsr-phase0", "tiny-pcsr-phase1"):
        config = load_config(CONFIGS / f"{name}.yaml")
        torch.manual_seed(0)
        model = models.make(config.model, data_norm=config.data_norm)
        content = {"model": {**config.model, "sd": model.state_dict()}, "iter": 0}
        save_checkpoint(folder / f"{name}.pth", content)
    return folder


def words(place: Path, name: str, *more: str, **replaced: Any) -> list[str]:
    """A command line for the config `name`; `replaced` options come instead of the usual ones."""
    options = {
        "config": CONFIGS / f"{name}.yaml",
        "hr_data": place / "hr",
        "weights": place / f"{name}.pth",
        "device": "cpu",
    } | replaced
    script = "test_pcsr.py" if "pcsr" in name else "test.py"
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return [script, *given, *more]


def run_script(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a script in this process, which spares importing torch anew; its exit code."""
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; (exit code, standard output, standard error)."""

    def call(command: list[str]) -> tuple[int, str, str]:
        code = run_script(command, monkeypatch)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """Run a command that must end in one line and exit code 2; that line."""

    def call(command: list[str]) -> str:
        code, _, errors = run(command)
        assert code == 2
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1
        return errors

    return call


# What comes out


@pytest.mark.parametrize("name", ["tiny-x4", "tiny-pcsr-phase1"])
def test_as_a_process_of_its_own(name, place, tmp_path) -> None:
    command = words(place, name, "--per_image", "--crop", json=tmp_path / "figures.json")
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    names = [path.name for path in list_images(place / "hr")]
    rows = [line.split()[0] for line in lines]
    assert [row for row in rows if row in (*names, "mean")] == [*names, "mean"]
    assert "rgb 8 bit, border 4 px; scale 4; LR bicubic float; whole images" in done.stdout
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [list(image) for image in written["images"]] == [IMAGE_KEYS] * 2
    assert [image["name"] for image in written["images"]] == names
    assert list(written["mean"]) == IMAGE_KEYS[1:]
    for key in ("psnr", "ssim", "flops_paper", "flops_executed", "time_s"):
        values = [image[key] for image in written["images"]]
        assert written["mean"][key] == pytest.approx(sum(values) / 2)
    assert written["conventions"]["border_px"] == 4
    assert written["machine"]["torch"] == torch.__version__
    assert written["peak_memory_bytes"] > 2**20
    printed = next(line.split() for line in lines if line.startswith("mean"))
    assert float(printed[1]) == pytest.approx(written["mean"]["psnr"], abs=6e-4)
    assert float(printed[3]) * 1e9 == pytest.approx(written["mean"]["flops_paper"], rel=1e-2)
    shares = [100 * share for share in written["mean"]["shares"]]
    assert [float(cell) for cell in printed[5:-1]] == pytest.approx(shares, abs=6e-3)


@pytest.mark.parametrize(
    ("more", "conventions"),
    [
        (["--k=-25"], {"routing": "k = -25", "per_image": False, "crop": True}),
        (["--adaptive", "--k", "0"], {"routing": "adaptive (ADM)", "refinement": True}),
        (["--upsampler", "light", "--no_refinement"], {"refinement": False}),
        (["--scale=2.5", "--per_image"], {"scale": 2.5, "border_px": 2, "crop": False}),
        (["--psnr_type=y", "--lr_mode=uint8"], {"psnr_type": "y", "lr": "bicubic uint8"}),
        (["--pixel_batch_size=1000", "--patch_batch_size=1"], {"patch_size": 32, "step": 28}),
        (["--set", "step=16", "--gpu=1", "--help"], None),
    ],
)
def test_words_of_test_pcsr(more, conventions, place, run, tmp_path) -> None:
    code, output, errors = run(words(place, "tiny-pcsr-phase1", *more, json=tmp_path / "f.json"))
    assert (code, errors) == (0, "")
    if conventions is None:
        assert "example:" in output
        return
    written = json.loads((tmp_path / "f.json").read_text())
    assert written["conventions"].items() >= conventions.items()
    if "--upsampler" in more:
        assert written["mean"]["shares"] == [1.0, 0.0]


@pytest.mark.parametrize("name", ["tiny-x4", "tiny-pcsr-phase1"])
def test_self_ensemble_costs_eight_times_as_much(name, place, run, tmp_path) -> None:
    command = words(place, name, "--per_image")
    content = []
    for more in ([], ["--self_ensemble"]):
        code, output, _ = run([*command, *more, f"--json={tmp_path / 'f.json'}"])
        assert (code, "self-ensemble of 8" in output) == (0, bool(more))
        content.append(json.loads((tmp_path / "f.json").read_text()))
    alone, together = content
    assert together["conventions"] == {**alone["conventions"], "self_ensemble": True}
    for one, eight in zip(alone["images"], together["images"], strict=True):
        assert eight["flops_paper"] == pytest.approx(8 * one["flops_paper"], rel=0.02)
        assert eight["psnr"] != one["psnr"] and len(eight["shares"]) == len(one["shares"])


def test_a_norm_that_changes_nothing_is_told(place, run) -> None:
    """The weights hold that of their network."""
    command = words(place, "tiny-pcsr-phase1", "--per_image", "--crop")
    code, shown, errors = run(command)
    assert code == 0 and "data_norm" not in errors
    code, other, errors = run([*command, "--set", "data_norm.std=[0.5,0.5,0.5]"])
    assert code == 0 and "the config's `data_norm` is not used: " in errors
    assert other.splitlines()[1].split()[:3] == shown.splitlines()[1].split()[:3]


def test_phase_0_checkpoint_is_all_heavy(place, run, tmp_path) -> None:
    weights = place / "tiny-pcsr-phase0.pth"
    idle = ("--adaptive", "--no_refinement")
    command = words(place, "tiny-pcsr-phase1", *idle, "--per_image", weights=weights)
    command.append("--original_config=configs/tiny-x4.yaml")
    code, output, errors = run([*command, f"--json={tmp_path / 'f.json'}"])
    for word in idle:
        assert f"{word} changes nothing: the model has one upsampler" in errors
    assert "--original_config changes nothing: no share of the original" in errors
    written = json.loads((tmp_path / "f.json").read_text())
    assert (code, written["mean"]["shares"]) == (0, [1.0])
    assert written["conventions"]["routing"] == "all-heavy"
    assert "heavy %" not in output


def test_given_lr_and_bicubic_row(place, run, tmp_path) -> None:
    json_path = tmp_path / "f.json"
    command = words(place, "tiny-x4", "--per_image", "--bicubic", lr_data=place / "lr")
    command += ["--lr_mode=uint8", "--patch_batch_size=8"]
    code, output, errors = run([*command, f"--json={json_path}"])
    assert code == 0
    assert "--lr_mode changes nothing: LR images are given" in errors
    assert "--patch_batch_size changes nothing: images are run whole" in errors
    assert output.index("bicubic ") < output.index("mean ")
    written = json.loads(json_path.read_text())
    assert written["conventions"]["lr"] == "given"
    assert list(written["bicubic"]["mean"]) == ["psnr", "ssim"]
    assert len(written["bicubic"]["images"]) == 2


def test_psnr_by_other_conventions(place, run, tmp_path) -> None:
    json_path = tmp_path / "f.json"
    words_ = words(place, "tiny-x4", "--per_image", "--bicubic", "--all_psnr", "--psnr_type=y")
    code, output, _ = run([*words_, f"--json={json_path}"])
    assert code == 0
    assert output.index("\nmean ") < output.index("\nmean PSNR dB") < output.index("conventions:")
    written = json.loads(json_path.read_text())
    for part in (written, written["bicubic"]):
        for of_image in (*part["images"], part["mean"]):
            by_convention = of_image["psnr_by_convention"]
            assert by_convention["y"]["4"] == pytest.approx(of_image["psnr"], abs=1e-9)
            assert by_convention["rgb"]["4"] != by_convention["rgb"]["10"]


def test_images_of_the_configs_test_dataset(place, run) -> None:
    dataset = f"{{name: image-folder, args: {{root_path: '{place / 'hr'}', first_k: 1}}}}"
    more = [f"--set=test_dataset.dataset={dataset}", "--set=test_dataset.wrapper={name: x}"]
    code, output, _ = run(words(place, "tiny-x4", *more, hr_data=None))
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()].count("coffee_x344_y144.png") == 0


# What is refused


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--k=nan"], "--k"),
        (["--k=inf"], "--k"),
        (["--k=x"], "--k"),
        (["--scale=0"], "--scale"),
        (["--scale=nan"], "--scale"),
        (["--scale=-1"], "--scale"),
        (["--scale=0.5", "--per_image"], "--scale"),
        (["--scale=2.7"], "use --per_image"),
        (["--scale=1000", "--per_image"], "too small for scale 1000"),
        (["--pixel_batch_size=0"], "--pixel_batch_size"),
        (["--pixel_batch_size=1.5"], "--pixel_batch_size"),
        (["--patch_batch_size=-3"], "--patch_batch_size"),
        (["--upsampler=middle"], "--upsampler"),
        (["--upsampler=2"], "the model has 2"),
        (["--upsampler=light", "--adaptive"], "contradict"),
        (["--json=."], "no file name"),
        (["--json=/proc/none/x.json"], "there is no /proc/none/x.json to write to"),
        (["--json=test.py/x.json"], "test.py is not a writable folder"),
        (["--json=x/img_001.PNG"], "the name of another kind of file"),
        (["--json=x/release.pth"], "the name of another kind of file"),
        (["--json=x/config.yaml"], "the name of another kind of file"),
        (["--set=step=40"], "gaps"),
        (["--set=setp=28"], "did you mean `step`"),
        (["--devise=cpu"], "--devise"),
        (["--gpu=0"], "contradict"),
    ],
)
def test_bad_words(more, problem, place, refused) -> None:
    assert problem in refused(words(place, "tiny-pcsr-phase1", *more))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("option", [{"device": "cuda"}, {"device": None, "gpu": "0"}])
def test_cuda_asked_for_and_absent(option, place, refused) -> None:
    assert "asked for, but" in refused(words(place, "tiny-x4", **option))


def test_no_images(place, refused, tmp_path) -> None:
    assert "does not exist" in refused(words(place, "tiny-x4", hr_data=tmp_path / "no"))
    assert "no images in" in refused(words(place, "tiny-x4", hr_data=tmp_path))
    assert "--hr_data" in refused(words(place, "tiny-x4", hr_data=None))


def test_pairs_that_do_not_match(place, refused, tmp_path) -> None:
    small = Picture(np.zeros((32, 62, 3), np.uint8))
    name = list_images(place / "hr")[0].stem
    write_picture(tmp_path / f"{name}.png", small)
    line = refused(words(place, "tiny-x4", lr_data=tmp_path))
    assert "have no partner" in line
    assert "HR coffee_x344_y144.png" in line
    write_picture(tmp_path / "coffee_x344_y144.png", small)
    line = refused(words(place, "tiny-x4", lr_data=tmp_path))
    assert "coffee_x344_y144.png is 131x140" in line
    assert "62x32" in line


def test_files_that_are_no_images(place, refused, tmp_path) -> None:
    whole = list_images(place / "hr")[0]
    (tmp_path / "a.png").write_bytes(whole.read_bytes())
    (tmp_path / "b.png").write_text("not a picture")
    assert "b.png is not a png" in refused(words(place, "tiny-x4", hr_data=tmp_path))
    (tmp_path / "b.png").write_bytes(whole.read_bytes()[:20000])
    assert "b.png is damaged" in refused(words(place, "tiny-x4", hr_data=tmp_path))


def test_nothing_is_written_when_an_image_is_damaged(place, refused, tmp_path) -> None:
    (tmp_path / "hr").mkdir()
    for name, size in (("a.png", None), ("b.png", 20000)):
        data = list_images(place / "hr")[0].read_bytes()[:size]
        (tmp_path / "hr" / name).write_bytes(data)
    (tmp_path / "figures.json").write_text("before")
    refused(words(place, "tiny-x4", hr_data=tmp_path / "hr", json=tmp_path / "figures.json"))
    assert (tmp_path / "figures.json").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "hr"]


def test_checkpoints_of_another_model(place, refused, tmp_path) -> None:
    original, pcsr = place / "tiny-x4.pth", place / "tiny-pcsr-phase1.pth"
    model = load_config(CONFIGS / "tiny-x4.yaml").model
    line = refused(words(place, "tiny-pcsr-phase1", weights=original))
    assert f"holds `{model['name']}`" in line
    assert "holds `pcsr-phase1`" in refused(words(place, "tiny-x4", weights=pcsr))
    width, value = next(iter(model["args"].items()))
    line = refused(words(place, "tiny-x4", f"--set=model.args.{width}={value + 1}"))
    assert f"its `{width}` is {value}, the config's is {value + 1}" in line
    assert "does not exist" in refused(words(place, "tiny-x4", weights=tmp_path / "no.pth"))
    (tmp_path / "cut.pth").write_bytes(original.read_bytes()[:5000])
    assert "damaged" in refused(words(place, "tiny-x4", weights=tmp_path / "cut.pth"))
    config = {"config": CONFIGS / "tiny-pcsr-phase1.yaml"}
    assert "use test_pcsr.py" in refused(words(place, "tiny-x4", **config))


class _Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_runs_code_is_refused(place, refused, tmp_path) -> None:
    bomb = {"model": {"name": "carn", "sd": {}, "args": _Bomb(tmp_path / "went_off")}}
    torch.save(bomb, tmp_path / "zipped.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(bomb, protocol=2))
    for name in ("zipped.pth", "plain.pth"):
        assert "refused" in refused(words(place, "tiny-x4", weights=tmp_path / name))
    assert not (tmp_path / "went_off").exists()
