"""results/: pages are what their JSON files give, and these are of the released weights."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import learning_page
from benchmarks.cases import REPOSITORY, Networks, Source
from benchmarks.results.lessons import (
    JUDGE,
    PAYS,
    TOLERANCE_DB,
    fastest,
    lessons_text,
    recommended,
)
from benchmarks.results.pages import CARD, README, replaced, texts
from benchmarks.results.pictures import drawn_with, path_of
from benchmarks.results.quality import measure_subject
from benchmarks.results.speed import ORIGINALS, WITH_MEMORY, _costs, measure_speed
from benchmarks.results.subjects import (
    CONVENTIONS,
    LABELS,
    ROOT,
    ROUTINGS,
    Subject,
    chosen,
    identity,
    read_json,
    routing_of,
    stale_files,
    write_figures,
)
from benchmarks.results.tables import (
    giga,
    loss,
    measured_subjects,
    milliseconds,
    percent,
    table,
)
from engine.evaluation import Evaluation, Figures, Restore, mean_of
from engine.loading import load_original, load_pcsr
from engine.rerouted import ReroutedImage, part_way
from engine.restore import OriginalRestorer, PcsrRestorer
from engine.samples import EvaluationSet, ImagePaths
from models.routing import FixedRouting
from tests.test_fast import make_model
from utils.errors import UserError
from utils.images import Picture, read_rgb, write_picture
from utils.metrics import PsnrType

CPU = torch.device("cpu")

RELEASED = [subject for subject in measured_subjects() if not subject.is_official]


def test_pages_are_rendered_from_the_figures() -> None:
    for path, text in texts().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run benchmarks.results render"


@pytest.mark.parametrize("subject", RELEASED, ids=lambda subject: subject.name)
def test_figures_are_of_the_released_weights(subject: Subject) -> None:
    named = zip(("original", "pcsr"), subject.weights(None), strict=True)
    released = {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in named if path}
    for path, read in (
        (subject.figures_path, read_json),
        (subject.speed_path, read_json),
        (path_of(subject), drawn_with),
    ):
        if path.is_file():
            content = read(path)
            found = {key: content.get(key, {}).get("sha256") for key in released}
            assert found == released, f"{path} is of other weights: run make results"


def test_a_part_of_a_page_is_replaced() -> None:
    begin, end = "<!-- x: written by make results -->", "<!-- end of x -->"
    page = f"before\n{begin}\nold\n{end}\nafter\n"
    assert replaced(page, "x", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert replaced(page, "y", "new") == page
    for path in (CARD, README):
        text = path.read_text(encoding="utf-8")
        assert text.count("written by make results -->") == text.count("<!-- end of ")


def test_numbers_are_written_as_such() -> None:
    assert (giga(0.2549e9), giga(12.345e9)) == ("0.255", "12.35")
    assert (percent(0.6196), percent(None)) == ("62.0 %", "-")
    assert (milliseconds(0.0123), milliseconds(1.5)) == ("12.3 ms", "1.50 s")
    assert table(["a", "b"], [["1", "2"]], left=1).splitlines()[1] == "| --- | ---: |"


def test_every_routing_has_a_label() -> None:
    assert set(ROUTINGS) < set(LABELS)
    with pytest.raises(UserError, match="--models vdsr: choose from fsrcnn"):
        chosen(["vdsr"])


def test_figures_that_differ_by_rounding_are_written_alike(tmp_path) -> None:
    for name, value in (("a", 28.5919231), ("b", 28.5919234)):
        write_figures(tmp_path / name, {"rows": [{"psnr": value}]})
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


@pytest.mark.parametrize("subject", measured_subjects(), ids=lambda subject: subject.name)
def test_lessons_choose_the_fastest_good_routing(subject: Subject) -> None:
    times = read_json(subject.speed_path)["images"]["rows"]
    good = [key for key in ROUTINGS if (loss(subject, JUDGE, key) or 0.0) <= TOLERANCE_DB]
    assert fastest(subject) in good
    assert times[fastest(subject)]["time_s"] == min(times[key]["time_s"] for key in good)


@pytest.mark.parametrize("subject", measured_subjects(), ids=lambda subject: subject.name)
def test_lessons_recommend_what_pays(subject: Subject) -> None:
    page = lessons_text()
    verdicts, advice = page.split("## Where routing pixels pays")[1].split("## What to use")
    line = next(each for each in verdicts.splitlines() if each.startswith(f"| {subject.title} |"))
    advised = next(each for each in advice.splitlines() if each.startswith(f"| {subject.title} |"))
    pays = line.endswith(f"| {PAYS} |")
    assert pays == (advised.count("the original:") < 2)
    assert recommended(subject) == fastest(subject) or pays


def test_figures_of_other_weights_are_named(tmp_path, monkeypatch) -> None:
    assert stale_files() == []
    monkeypatch.setattr("benchmarks.results.subjects.FIGURES", tmp_path)
    (tmp_path / "carn.json").write_text('{"original": {"sha256": "1"}, "pcsr": {"sha256": "2"}}')
    assert stale_files() == [tmp_path / "carn.json"]


def test_the_learning_page_is_of_the_weights_that_are_here() -> None:
    learning = REPOSITORY / "results" / "learning"
    content = read_json(learning / "learning.json")
    about = content["routing"]["weights"]
    assert identity(REPOSITORY / about["weights"]) == about
    assert (learning / "README.md").read_text(encoding="utf-8") == learning_page.page(content)


@pytest.mark.parametrize("key", ["k0", "adm", "way25", "heavy"])
def test_rerouted_image_is_what_a_run_gives(key: str) -> None:
    model = make_model("carn", 2)
    lr = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    restorer = PcsrRestorer(model)
    routing = routing_of(key, restorer, (20, 24), (80, 96))
    image = ReroutedImage(restorer, lr, (80, 96))
    found = image(routing)
    expected = PcsrRestorer(model, routing)(lr, (80, 96))
    unrefined = PcsrRestorer(model, routing, refinement=False)(lr, (80, 96))
    torch.testing.assert_close(image(routing, refinement=False).sr, unrefined.sr, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.sr, expected.sr, atol=1e-5, rtol=0)
    assert found.classes is not None and expected.classes is not None
    assert torch.equal(found.classes, expected.classes)
    assert found.flops_paper == expected.flops_paper
    assert found.flops_executed == expected.flops_executed
    assert found.shares == expected.shares
    assert math.isnan(found.time_s)


def test_part_way_lies_between_the_ends() -> None:
    restorer = PcsrRestorer(make_model("carn", 2))
    lr = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    image = ReroutedImage(restorer, lr, (80, 96))
    light, heavy = (image(FixedRouting(index)).flops_executed for index in (0, -1))
    half = image(part_way(restorer, (20, 24), (80, 96), 0.5)).flops_executed
    assert half <= (light + heavy) / 2
    assert np.isclose(half, (light + heavy) / 2, rtol=0.02)


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Two small pictures as Set5; figures are written beside them."""
    monkeypatch.setattr("benchmarks.results.subjects.FIGURES", tmp_path)
    folder = tmp_path / "data" / "Set5" / "HR"
    folder.mkdir(parents=True)
    photo = read_rgb(ROOT / "examples" / "chelsea.png")
    for index, top in enumerate((100, 60)):
        crop = np.ascontiguousarray(photo[top : top + 128, 120:248])
        write_picture(folder / f"{index}.png", Picture(crop))
    return tmp_path / "data"


def test_figures_are_those_of_an_evaluation(data) -> None:
    (subject,) = chosen(["fsrcnn"])
    original_path, pcsr_path = subject.weights(None)
    assert original_path is not None and pcsr_path is not None
    measure_subject(subject, (original_path, pcsr_path), data, ["Set5"], CPU)
    rows = read_json(subject.figures_path)["sets"]["Set5"]["rows"]
    paths = ImagePaths.of_folders(data / "Set5" / "HR")

    def evaluated(restore: Restore, psnr_type: PsnrType) -> Figures:
        images = EvaluationSet(paths, replace(CONVENTIONS, psnr_type=psnr_type))
        return mean_of(list(map(Evaluation(images, restore, CPU), range(2))))

    model = load_pcsr(pcsr_path, CPU)
    refined, unrefined = (PcsrRestorer(model, refinement=each) for each in (True, False))
    original = OriginalRestorer(load_original(original_path, CPU))
    for row, restore in (("k0", refined), ("original", original)):
        rgb, y = evaluated(restore, "rgb"), evaluated(restore, "y")
        expected = {"psnr_rgb": rgb.psnr, "psnr_y": y.psnr, "ssim_y": y.ssim}
        expected |= {"flops_paper": rgb.flops_paper, "flops_executed": rgb.flops_executed}
        if row == "k0":
            plain = evaluated(unrefined, "rgb").psnr
            expected |= {"psnr_rgb_unrefined": plain, "heavy_share": rgb.shares[-1]}
        assert rows[row] == pytest.approx(expected, abs=1e-4)


def test_figures_of_other_weights_go(data) -> None:
    (subject,) = chosen(["fsrcnn"])
    path = subject.weights(None)[1]
    assert path is not None
    for sha256, sets in ((hashlib.sha256(path.read_bytes()).hexdigest(), 2), ("other", 1)):
        measure_subject(subject, (None, path), data, ["Set5"], CPU)
        content = read_json(subject.figures_path)
        content["sets"]["Set14"] = content["sets"]["Set5"]
        content["pcsr"]["sha256"] = sha256
        write_figures(subject.figures_path, content)
        measure_subject(subject, (None, path), data, ["Set5"], CPU)
        assert len(read_json(subject.figures_path)["sets"]) == sets


def test_costs_beside_times_are_those_of_runs() -> None:
    networks = Networks(Source("fsrcnn", None, None), CPU)
    lr = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    rows = _costs(networks, PcsrRestorer(networks.pcsr), lr)
    assert set(rows) == {*ORIGINALS, *ROUTINGS}
    assert rows["original"]["heavy_share"] is None
    restored = PcsrRestorer(networks.pcsr, FixedRouting(-1))(lr, (80, 96))
    assert rows["heavy"] == {
        "flops_paper": restored.flops_paper,
        "flops_executed": restored.flops_executed,
        "heavy_share": 1.0,
    }


def test_times_are_of_every_case_on_the_picture_and_on_images(data, monkeypatch) -> None:
    (data / "Set5").rename(data / "BSD100")
    monkeypatch.setattr("benchmarks.results.speed.LR_SIZE", (24, 32))
    monkeypatch.setattr("benchmarks.results.speed.EVERY", 1)
    monkeypatch.setattr("benchmarks.results.speed.IMAGE_ROUNDS", 3)
    monkeypatch.setattr("benchmarks.results.speed.peak_memory", lambda job: job.lr_size[0])
    (subject,) = chosen(["fsrcnn"])
    measure_speed(subject, subject.weights(None), data, CPU, 3)
    content = read_json(subject.speed_path)
    committed = read_json(ROOT / "results" / "figures" / subject.speed_path.name)
    assert content.keys() == committed.keys() and content["pcsr"] == committed["pcsr"]
    for part in ("picture", "images"):
        assert content[part]["rows"].keys() == committed[part]["rows"].keys()
        assert all(row["time_s"] > 0 for row in content[part]["rows"].values())
    rows = content["picture"]["rows"]
    assert {key for key, row in rows.items() if row.get("peak_memory_bytes") == 24} == {
        *WITH_MEMORY
    }
