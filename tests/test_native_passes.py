"""Compiled passes over pixels: what plain torch gives, in any size, piece and number of threads."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch

from models import native, refinement, routing
from models.native import library, passes
from models.refinement import RefineRows, refine
from models.routing import AdaptiveRouting, HeavyScores
from tests.test_native import has_compiler, loaded

pytestmark = has_compiler

# Around the widths of vectors and of blocks.
SIZES = [(1, 1), (2, 5), (3, 3), (4, 1), (5, 2), (3, 17), (7, 129), (6, 130), (5, 131), (9, 400)]


@pytest.fixture
def threads() -> Iterator[None]:
    """Numbers of threads that a test sets are set back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextmanager
def without_kernels() -> Iterator[None]:
    """As PCSR_NATIVE=0 has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "0")
        library.cache_clear()
        yield
    library.cache_clear()


def make_image(size: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A prediction, and classes with regions of one class and such of three."""
    torch.manual_seed(0)
    classes = torch.randint(3, (batch, *size)).to(torch.uint8)
    classes[:, :, size[1] // 2 :] = 1
    return torch.rand(batch, 3, *size), classes


@pytest.mark.parametrize("size", SIZES)
def test_refinement_is_that_of_plain_torch(size: tuple[int, int]) -> None:
    prediction, classes = make_image(size)
    before = prediction.clone()
    refined = refine(prediction, classes)
    assert torch.equal(refined, refinement._plainly_refined(prediction, classes))
    assert torch.equal(prediction, before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("run", [1, 2, 4])
def test_refinement_in_runs_of_rows(size: tuple[int, int], run: int) -> None:
    """Some of no row, as they come at scales below 1."""
    prediction, classes = make_image(size)
    out = torch.full_like(prediction, float("nan"))
    rows = RefineRows(out)
    starts = [0, 0, *range(0, size[0], run), size[0], size[0]]
    for index, (a, b) in enumerate(pairwise(starts)):
        rows.push(prediction[:, :, a:b], classes[:, a:b], last=index == len(starts) - 2)
    assert torch.equal(out, refine(prediction, classes))


def test_number_of_threads_changes_no_refinement(threads: None) -> None:
    prediction, classes = make_image((50, 70))
    refined = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        refined.append(refine(prediction, classes))
    assert torch.equal(refined[0], refined[1]) and torch.equal(refined[0], refined[2])


def test_refinement_does_not_hide_nan() -> None:
    prediction, classes = torch.rand(1, 3, 5, 40), torch.zeros(1, 5, 40, dtype=torch.uint8)
    classes[0, 2, 20] = 1
    prediction[0, 1, 2, 20] = float("nan")
    assert refine(prediction, classes).isnan().sum() == 9


def test_refinement_of_other_types_and_orders() -> None:
    prediction, classes = make_image((9, 40))
    expected = refine(prediction, classes)
    columns_first = prediction.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(refine(columns_first, classes), expected)
    every_second = prediction.repeat_interleave(2, dim=2)[:, :, ::2]
    assert torch.equal(refine(every_second, classes), expected)
    in_double = refine(prediction.double(), classes)
    assert in_double.dtype == torch.float64
    torch.testing.assert_close(in_double.float(), expected)
    learnt = prediction.clone().requires_grad_()
    refine(learnt, classes).sum().backward()
    assert learnt.grad is not None


def test_refinement_that_is_wrong_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prediction, classes = make_image((9, 40))
    expected = refine(prediction, classes)
    monkeypatch.setattr(refinement, "refine_rows", lambda *words: words[-1].zero_())
    refinement._are_right.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(refine(prediction, classes), expected)
    refinement._are_right.cache_clear()
    assert "refinement is wrong; plain torch is used instead" in caplog.text


def test_refinement_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, classes = make_image((9, 40))
    expected = refine(prediction, classes)
    monkeypatch.setattr(refinement, "refine_rows", None)
    with without_kernels():
        assert torch.equal(refine(prediction, classes), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction_BCHW", torch.zeros(1, 3, 5, 6, dtype=torch.float64)),
        ("prediction_BCHW", torch.zeros(1, 3, 5, 7)),
        ("prediction_BCHW", torch.zeros(1, 3, 6, 5).transpose(2, 3)),
        ("classes_BHW", torch.zeros(1, 5, 6, dtype=torch.int64)),
        ("classes_BHW", torch.zeros(1, 4, 6, dtype=torch.uint8)),
        ("out_BCrW", torch.zeros(1, 3, 5, 6, dtype=torch.float16)),
        ("rows 0 to 6 of 5", torch.zeros(1, 3, 6, 6)),
    ],
)
def test_other_tensors_than_refinement_reads_are_refused(name: str, value: torch.Tensor) -> None:
    tensors = {
        "prediction_BCHW": torch.zeros(1, 3, 5, 6),
        "classes_BHW": torch.zeros(1, 5, 6, dtype=torch.uint8),
        "out_BCrW": torch.zeros(1, 3, 5, 6),
    }
    tensors[name if name in tensors else "out_BCrW"] = value
    prediction, classes, out = tensors.values()
    with pytest.raises(ValueError, match=name):
        passes.refine_rows(loaded(), [(prediction, classes)], 0, out)


def scores_of(pixels: int, spread: float = 3.0) -> HeavyScores:
    """Those of random margins."""
    generator = torch.Generator().manual_seed(0)
    return HeavyScores(spread * torch.randn(1, 1, 1, pixels, generator=generator))


@pytest.mark.parametrize("pixels", [1, 2, 17, 2**14 - 1, 2**14 + 1, 100_003, 2**20 + 5])
def test_histogram_is_that_of_plain_torch(pixels: int) -> None:
    """Counts and sums of the same scores; all but the first bin's sums are exact."""
    scores = scores_of(pixels)
    found = scores.histogram()
    with without_kernels():
        expected = scores.histogram()
    assert torch.equal(found[0], expected[0]) and found[0].sum() == pixels
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=0)


def test_histogram_of_scores_at_the_ends_and_beyond() -> None:
    values = [0.0, 1.0, 0.25, 0.75, -1.0, 7.0, math.inf, -math.inf, math.nan]
    counts = passes.histogram(loaded(), [torch.tensor(values)], 4)[0]
    assert counts.tolist() == [4, 1, 0, 4]


def test_number_of_threads_changes_no_classes(threads: None) -> None:
    margins = torch.randn(1, 1, 300, 400)
    classes = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        classes.append(AdaptiveRouting().classes(margins, (0.0, 0.7)))
    with without_kernels():
        classes.append(AdaptiveRouting().classes(margins, (0.0, 0.7)))
    assert all(torch.equal(one, classes[0]) for one in classes)


@pytest.mark.parametrize(
    "scores",
    [torch.zeros(3, dtype=torch.float64), torch.zeros(2, 3), torch.zeros(6)[::2]],
)
def test_other_scores_than_the_histogram_reads_are_refused(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="scores"):
        passes.histogram(loaded(), [scores], 4)


def test_scores_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    margins = torch.randn(1, 1, 30, 40)
    expected = AdaptiveRouting().classes(margins, (0.0, 0.7))
    monkeypatch.setattr(routing, "KEPT_SCORES", 0)
    assert torch.equal(AdaptiveRouting().classes(margins, (0.0, 0.7)), expected)
