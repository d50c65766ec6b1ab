"""The compiled CPU kernels: what test_fast.py does not show, and what happens without them.

test_fast.py compares them with the reference engine at every scale.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.restore import PcsrRestorer, make_engine
from models import native
from models.cost import count_rows
from models.fast import FastEngine
from models.inference import super_resolve
from models.native import compiler, library
from models.native.bindings import Library
from models.native_engine import NativeEngine
from models.routing import AdaptiveRouting, FixedRouting, KRouting
from tests.test_fast import check_equal, grid_of, make_model
from utils.errors import UserError

has_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")),
    reason="needs a C compiler",
)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "SOURCE", tmp_path / "source" / compiler.SOURCE.name)
    (tmp_path / "source").mkdir()
    shutil.copy(Path(native.__file__).with_name("pixel_mlp.c"), tmp_path / "source")
    library.cache_clear()
    yield tmp_path / "pcsr"
    library.cache_clear()


def loaded() -> Library:
    """The kernels, which must be there."""
    kernels = library()
    assert kernels is not None
    return kernels


@has_compiler
def test_they_are_what_users_run_on_a_cpu() -> None:
    assert isinstance(make_engine(make_model("fsrcnn")), NativeEngine)


@has_compiler
@pytest.mark.parametrize("size", [(8, 2080), (7, 1333)])
def test_rows_of_several_segments(size: tuple[int, int]) -> None:
    """520 LR pixels are three segments, the last with a rest that fills no vector."""
    check_equal(make_model("fsrcnn", 3), torch.rand(1, 3, 2, 520), size, KRouting(0.0))


@has_compiler
@pytest.mark.parametrize("size", [(36, 28), (25, 30), (5, 40)])
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_cost_is_what_the_kernels_count(size: tuple[int, int], upsamplers: int) -> None:
    """Multiply-adds counted where they are done, against what budgets are planned with."""
    model = make_model("carn", upsamplers)
    engine = NativeEngine(loaded(), model)
    lr = torch.rand(1, 3, 9, 7)
    grid = grid_of(lr, size)
    feat = engine.encode(lr)
    classified = engine.classify(feat, grid)[1]
    cost = engine.cost(grid, [9])
    assert classified == cost.fixed
    some = torch.zeros(1, *size, dtype=torch.uint8)
    some[:, size[0] // 2 :, : size[1] // 2] = upsamplers - 1
    for classes in (some, torch.zeros_like(some), torch.ones_like(some)):
        executed = engine.upsample(lr, feat, grid, classes).flops
        assert classified + executed == cost.total(count_rows(classes, upsamplers))


@has_compiler
def test_flops_of_all_heavy_are_those_of_its_layers() -> None:
    engine = NativeEngine(loaded(), make_model("fsrcnn"))
    lr = torch.rand(1, 3, 8, 8)
    classes = torch.ones(1, 32, 32, dtype=torch.uint8)
    flops = engine.upsample(lr, engine.encode(lr), grid_of(lr, (32, 32)), classes).flops
    layers = [12 * 21, 21 * 20 + 20 * 19 + 19 * 3]
    assert flops == 2 * (64 * layers[0] + 1024 * layers[1])


@has_compiler
@pytest.mark.parametrize("size", [(160, 84), (101, 77)])
def test_the_number_of_threads_changes_nothing(size: tuple[int, int]) -> None:
    model = make_model("fsrcnn")
    engine = NativeEngine(loaded(), model)
    lr = torch.rand(1, 3, 40, 21)
    feat, grid = engine.encode(lr), grid_of(lr, size)
    classes = (torch.rand(1, *size) < 0.3).to(torch.uint8)
    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            margins = engine.classify(feat, grid)[0]
            outputs.append((margins, engine.upsample(lr, feat, grid, classes).sr))
    finally:
        torch.set_num_threads(before)
    for margins, sr in outputs[1:]:
        assert torch.equal(margins, outputs[0][0]) and torch.equal(sr, outputs[0][1])


@has_compiler
def test_threads_of_our_own_where_torch_has_none_to_lend() -> None:
    kernels = Library(compiler.build())
    model = make_model("fsrcnn")
    lr = torch.rand(1, 3, 9, 7)
    expected = super_resolve(NativeEngine(kernels, model), lr, (36, 28), KRouting(0.0), (0.0, 0.7))
    kernels._parallel = None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        result = super_resolve(
            NativeEngine(kernels, model), lr, (36, 28), KRouting(0.0), (0.0, 0.7)
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(result.sr, expected.sr)


@has_compiler
def test_nan_is_not_hidden() -> None:
    """As plain torch has it: ReLU keeps what is no number."""
    engine = NativeEngine(loaded(), make_model("fsrcnn"))
    lr = torch.rand(1, 3, 8, 8)
    feat = engine.encode(lr).clone()
    feat[0, :, 2, 3] = float("nan")
    grid = grid_of(lr, (32, 32))
    for classes in (torch.zeros(1, 32, 32), torch.ones(1, 32, 32)):
        sr = engine.upsample(lr, feat, grid, classes.to(torch.uint8)).sr
        found = sr.isnan()
        assert found[0, :, 8:12, 12:16].all() and found.sum() == 3 * 16
    assert engine.classify(feat, grid)[0].isnan().sum() == 16


@has_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_the_encoder(dtype: torch.dtype) -> None:
    model = make_model("carn")
    lr = torch.rand(1, 3, 9, 7)
    full, half = (
        super_resolve(
            NativeEngine(loaded(), model, dtype=d), lr, (36, 28), FixedRouting(-1), (0.0, 0.7)
        )
        for d in (torch.float32, dtype)
    )
    torch.testing.assert_close(half.sr, full.sr, rtol=0, atol=0.02)
    assert not torch.equal(half.sr, full.sr)


@has_compiler
def test_compiled_once_and_kept(fresh: Path) -> None:
    path = compiler.build()
    assert path.parent == fresh and [p.name for p in fresh.iterdir()] == [path.name]
    written = path.stat().st_mtime_ns
    assert compiler.build() == path and path.stat().st_mtime_ns == written
    compiler.SOURCE.write_text(compiler.SOURCE.read_text() + "\n")
    assert compiler.build() != path, "another source is another library"


@has_compiler
def test_a_cache_folder_that_cannot_be_written(fresh: Path) -> None:
    fresh.write_text("a file where the folder should be")
    assert compiler.build().parent == compiler.SOURCE.parent / "__pycache__"


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain torch, and one line that says so."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO):
        engines = [make_engine(make_model("fsrcnn")) for _ in range(2)]
    assert {type(engine) for engine in engines} == {FastEngine}
    (line,) = [record.message for record in caplog.records]
    assert "no C compiler (cc, gcc, clang)" in line and "plain torch" in line


@has_compiler
def test_a_compiler_that_fails(fresh: Path) -> None:
    compiler.SOURCE.write_text("this is not C\n")
    with pytest.raises(UserError, match="does not compile"):
        compiler.build()
    assert not list(fresh.iterdir()), "nothing half-written stays"
    assert library() is None


def test_a_library_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.so"
    path.write_bytes(b"not a library")
    with pytest.raises(UserError, match="cannot be loaded"):
        Library(path)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    library.cache_clear()
    try:
        assert type(make_engine(make_model("fsrcnn"))) is FastEngine
    finally:
        monkeypatch.undo()
        library.cache_clear()


@has_compiler
def test_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply = Library.apply

    def wrong(self: Library, mlps: object, feat: object, grid: object, out, **more: object) -> int:
        flops = apply(self, mlps, feat, grid, out, **more)  # type: ignore[arg-type]
        out.view(-1)[3] += 0.5
        return flops

    monkeypatch.setattr(Library, "apply", wrong)
    assert type(make_engine(make_model("fsrcnn"))) is FastEngine
    assert "margins are wrong; plain torch is used instead" in caplog.text


@has_compiler
def test_budget_of_small_images_is_met(tmp_path: Path) -> None:
    """A strip is one LR row, so that even a small image has something to choose."""
    model = make_model("carn")
    restorer = PcsrRestorer(model, AdaptiveRouting())
    cost = restorer.image_cost((9, 7), (36, 28)).cost
    assert len(cost.strip_starts) == 9
    assert np.all(np.diff(cost.strip_starts) == 4)
