"""Sweeps: their points are what normal runs give, and what test_pcsr.py --sweep leaves behind."""

import dataclasses
import json
from collections.abc import Container
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from engine.conventions import Conventions
from engine.restore import Patches, PcsrRestorer
from engine.samples import EvaluationSample
from engine.sweep import STEPS, Point, PointFigures, _Swept, points_for, sweep_image
from engine.sweep_report import print_table
from models.routing import AdaptiveRouting, FixedRouting, KRouting, Routing
from tests.test_fast import make_model
from tests.test_test_scripts import REPOSITORY, run_script
from tests.training import make_pictures
from utils.checkpoint import save_checkpoint
from utils.config import load_config
from utils.images import Picture, list_images, read_rgb, to_tensor, write_picture
from utils.metrics import psnr

CPU = torch.device("cpu")
CONVENTIONS = Conventions(4.0, "rgb", "bicubic float", crop=False, per_image=True)


@pytest.fixture(scope="module")
def sample() -> EvaluationSample:
    """Two patches of noise."""
    generator = torch.Generator().manual_seed(0)
    hr = np.random.default_rng(0).integers(0, 256, (240, 128, 3), np.uint8)
    return EvaluationSample("noise.png", torch.rand(3, 60, 32, generator=generator), hr)


def sweep(
    restorer: PcsrRestorer,
    sample: EvaluationSample,
    conventions: Conventions = CONVENTIONS,
    names: Container[str] | None = None,
) -> list[tuple[Point, PointFigures]]:
    """The points, or those of some names, and their figures."""
    points = points_for(len(restorer.model.upsamplers))
    points = [point for point in points if names is None or point.name in names]
    figures = sweep_image(restorer, sample, points, CPU, conventions, is_timed=False)
    return list(zip(points, figures, strict=True))


@pytest.mark.parametrize(
    ("upsamplers", "patches", "refinement"),
    [(2, None, True), (3, None, False), (2, Patches(batch_size=1), True)],
    ids=["whole", "three-not-refined", "patches"],
)
def test_points_are_what_normal_runs_give(upsamplers, patches, refinement, sample) -> None:
    model = make_model("carn", upsamplers)
    restorer = PcsrRestorer(model, refinement=refinement, patches=patches)
    normal: dict[str, Routing] = {
        "k = 0": KRouting(0.0),
        "k = 1": KRouting(1.0),
        "budget 0%": FixedRouting(0),
        "budget 100%": FixedRouting(-1),
        "oracle 100%": FixedRouting(-1),
    }
    if upsamplers == 2:
        normal["ADM"] = AdaptiveRouting()
    swept = {point.name: f for point, f in sweep(restorer, sample, names=normal)}
    for name, routing in normal.items():
        restored = PcsrRestorer(model, routing, refinement=refinement, patches=patches)(
            sample.lr, sample.size
        )
        figures = swept[name]
        assert figures.shares == restored.shares
        assert figures.flops_executed == restored.flops_executed
        assert figures.flops_paper == restored.flops_paper
        # Rounding differs with the pixels that are worked on together: at most a few grey levels.
        expected = psnr(restored.sr, sample.hr, psnr_type="rgb", border_px=4)
        assert figures.psnr == pytest.approx(expected, abs=1e-4)
        assert figures.time_s > 0


def test_a_routing_that_needs_no_other_pixels_is_encoded_once(sample, monkeypatch) -> None:
    monkeypatch.setattr("models.inference.KEPT_FEATURES", 0)
    model = make_model("carn")
    routings: dict[str, Routing] = {"k = 0": KRouting(0.0), "ADM": AdaptiveRouting()}
    swept = {p.name: f for p, f in sweep(PcsrRestorer(model), sample, names=routings)}
    for name, routing in routings.items():
        restored = PcsrRestorer(model, routing)(sample.lr, sample.size)
        assert swept[name].flops_executed == restored.flops_executed


def test_curves_rise_evenly_from_light_to_heavy(sample) -> None:
    swept = sweep(PcsrRestorer(make_model("fsrcnn")), sample)
    for curve in ("budget", "oracle"):
        flops = [figures.flops_executed for point, figures in swept if point.curve == curve]
        assert len(flops) == STEPS + 1
        steps = [after - before for before, after in pairwise(flops)]
        assert steps == pytest.approx([(flops[-1] - flops[0]) / STEPS] * STEPS, rel=0.2)


@pytest.mark.parametrize(("upsamplers", "psnr_type"), [(2, "y"), (3, "rgb")])
def test_no_classifier_beats_the_oracle(upsamplers, psnr_type, sample) -> None:
    restorer = PcsrRestorer(make_model("carn", upsamplers), refinement=False)
    names = [f"{curve} {share}%" for curve in ("budget", "oracle") for share in (5, 35, 80, 95)]
    conventions = dataclasses.replace(CONVENTIONS, psnr_type=psnr_type)
    swept = sweep(restorer, sample, conventions, names)
    quality = {(point.curve, point.share): figures.psnr for point, figures in swept}
    for share in (0.05, 0.35, 0.8, 0.95):
        assert quality["oracle", share] > quality["budget", share]


def test_measured_times(sample) -> None:
    points = points_for(2)[2::10]
    figures = sweep_image(
        PcsrRestorer(make_model("fsrcnn")), sample, points, CPU, CONVENTIONS, is_timed=True
    )
    assert all(f.time_s > 0 for f in figures)


# The command line


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two small crops in hr/, and untrained checkpoints."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "hr").mkdir()
    for path in list_images(REPOSITORY / "datasets/tiny/valid"):
        write_picture(folder / "hr" / path.name, Picture(read_rgb(path)[:136, :128]))
    for name in ("tiny-pcsr-phase0", "tiny-pcsr-phase1"):
        config = load_config(REPOSITORY / f"configs/{name}.yaml")
        torch.manual_seed(0)
        model = models.make(config.model, data_norm=config.data_norm)
        content = {"model": {**config.model, "sd": model.state_dict()}, "iter": 0}
        save_checkpoint(folder / f"{name}.pth", content)
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Run test_pcsr.py; (exit code, standard output, standard error)."""

    def call(*words: str, weights: str = "tiny-pcsr-phase1.pth") -> tuple[int, str, str]:
        config = REPOSITORY / "configs/tiny-pcsr-phase1.yaml"
        command = ["test_pcsr.py", f"--config={config}", f"--hr_data={place / 'hr'}"]
        command += [f"--weights={place / weights}", "--device=cpu", *words]
        code = run_script(command, monkeypatch)
        return code, *capsys.readouterr()

    return call


def test_table_json_and_plot(run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    files = [f"--json={tmp_path / 'new' / 's.json'}", f"--plot={tmp_path / 'new' / 's.png'}"]
    code, output, errors = run("--sweep", "--per_image", *files)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    rows = [line.split("  ")[0] for line in lines]
    assert [row for row in rows if row.startswith(("k =", "ADM"))] == ["k = 0", "k = 1", "ADM"]
    table = [line for line in lines if line.startswith(("routing", "k =", "budget", "oracle"))]
    assert len({len(line) for line in table}) == 1
    assert table[0].endswith("time s (estimated)")
    assert read_rgb(tmp_path / "new" / "s.png").shape[2] == 3
    written = json.loads((tmp_path / "new" / "s.json").read_text())
    assert written["time"] == "estimated"
    assert written["conventions"]["routing"] == "swept"
    assert len(written["points"]) == 3 + 2 * (STEPS + 1)
    for point in written["points"]:
        values = [image["psnr"] for image in point["images"]]
        assert point["mean"]["psnr"] == pytest.approx(sum(values) / 2)
    assert len(written["original_flops_executed"]) == 2
    assert written["machine"]["torch"] == torch.__version__


def test_budget_and_sweep_agree(run, tmp_path) -> None:
    run("--sweep", f"--json={tmp_path / 's.json'}", "--sweep_time")
    swept = json.loads((tmp_path / "s.json").read_text())
    assert swept["time"] == "measured"
    point = next(p for p in swept["points"] if p["name"] == "budget 50%")["images"][0]
    original = swept["original_flops_executed"][point["name"]]
    share = point["flops_executed"] / original
    run(f"--budget={share * 1.00001}", f"--json={tmp_path / 'b.json'}")
    budget = json.loads((tmp_path / "b.json").read_text())
    assert budget["conventions"]["routing"].endswith("of the original's executed FLOPs")
    image = budget["images"][0]
    assert image["flops_executed"] == pytest.approx(point["flops_executed"], rel=1e-4)
    assert image["psnr"] == pytest.approx(point["psnr"], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--sweep", "--k=0"], "--k does not go with --sweep"),
        (["--sweep", "--budget=0.5"], "--budget does not go with --sweep"),
        (["--sweep", "--adaptive"], "--adaptive does not go with --sweep"),
        (["--sweep", "--bicubic"], "--bicubic does not go with --sweep"),
        (["--sweep", "--all_psnr"], "--all_psnr does not go with --sweep"),
        (["--sweep", "--self_ensemble"], "--self_ensemble does not go with --sweep"),
        (["--sweep_time"], "go with --sweep"),
        (["--plot=x.png"], "go with --sweep"),
        (["--sweep", "--plot=save/x.pth"], "expected a name that ends in .png, not `save/x.pth`"),
        (["--budget=60g"], "such as 60G"),
        (["--budget=0.5", "--k=0"], "contradict"),
        (["--budget=0.001"], "is too little"),
        (["--budget=0.5", "--original_config=configs/tiny-pcsr-phase1.yaml"], "not of an original"),
    ],
)
def test_bad_words(words, problem, run) -> None:
    code, _, errors = run(*words)
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert problem in errors


def test_a_plot_is_not_drawn_over_an_image(run, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    image = make_pictures(tmp_path / "hr", count=1) / "0.png"
    before = image.read_bytes()
    code, _, errors = run("--sweep", "--per_image", f"--hr_data={image.parent}", f"--plot={image}")
    assert code == 2
    assert errors == f"error: --plot {image} is an input and would be lost\n"
    assert image.read_bytes() == before


def test_one_upsampler_cannot_be_swept(run) -> None:
    code, _, errors = run("--sweep", weights="tiny-pcsr-phase0.pth")
    assert code == 2
    assert "nothing to choose" in errors


def test_a_line_of_the_table() -> None:
    lines: list[str] = []
    figures = PointFigures(30.0, 4e9, 1e9, [0.25, 0.75], 0.5)
    print_table([Point("mark", "ADM")], [figures], 2e9, is_timed=False, write=lines.append)
    (line,) = [line for line in lines if line.startswith("ADM")]
    assert line.split() == ["ADM", "30.000", "4.0000", "1.0000", "0.500", "25.00", "75.00", "0.500"]


@pytest.mark.parametrize("psnr_type", ["rgb", "y"])
def test_the_oracle_knows_the_errors_that_are_measured(psnr_type, sample) -> None:
    restorer = PcsrRestorer(make_model("carn"), refinement=False)
    conventions = dataclasses.replace(CONVENTIONS, psnr_type=psnr_type)
    gains = _Swept(restorer, sample, CPU, conventions).gains_BKHW
    light, heavy = (
        PcsrRestorer(restorer.model, FixedRouting(index), refinement=False)(
            sample.lr, sample.size
        ).sr.clamp(0, 1)
        - to_tensor(sample.hr)
        for index in (0, 1)
    )
    if psnr_type == "y":
        luma = torch.tensor([[65.481, 128.553, 24.966]])
        light, heavy = (torch.tensordot(luma, each, 1) for each in (light, heavy))
    expected = light.square().sum(0) - heavy.square().sum(0)
    torch.testing.assert_close(gains[0, 0], expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
