"""results/: pages are what their JSON files give, and these are of the released weights."""

import hashlib
import math

import numpy as np
import pytest
import torch

from benchmarks.results.lessons import cheapest, lessons_text
from benchmarks.results.pages import CARD, README, replaced, texts
from benchmarks.results.subjects import (
    LABELS,
    ROOT,
    ROUTINGS,
    Subject,
    chosen,
    read_json,
    routing_of,
    write_figures,
)
from benchmarks.results.tables import giga, measured_subjects, milliseconds, percent, table
from engine.rerouted import ReroutedImage, part_way
from engine.restore import PcsrRestorer
from models.routing import FixedRouting
from tests.test_fast import make_model
from utils.errors import UserError

RELEASED = [subject for subject in measured_subjects() if not subject.is_official]


def test_pages_are_rendered_from_the_figures() -> None:
    for path, text in texts().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run benchmarks.results render"


@pytest.mark.parametrize("subject", RELEASED, ids=lambda subject: subject.name)
def test_figures_are_of_the_released_weights(subject: Subject) -> None:
    content = read_json(subject.figures_path)
    for key in ("original", "pcsr"):
        if key in content:
            weights = ROOT / content[key]["weights"]
            found = hashlib.sha256(weights.read_bytes()).hexdigest()
            assert found == content[key]["sha256"], f"{weights} has changed: run make results"


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


def test_lessons_choose_the_cheapest_good_routing() -> None:
    assert lessons_text().startswith("# What the figures teach")
    assert all(cheapest(subject) in ROUTINGS for subject in RELEASED)


@pytest.mark.parametrize("key", ["k0", "adm", "way25", "heavy"])
def test_rerouted_image_is_what_a_run_gives(key: str) -> None:
    model = make_model("carn", 2)
    lr = torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0))
    restorer = PcsrRestorer(model)
    routing = routing_of(key, restorer, (20, 24), (80, 96))
    found = ReroutedImage(restorer, lr, (80, 96))(routing)
    expected = PcsrRestorer(model, routing)(lr, (80, 96))
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
