"""The compiled CPU kernels: what test_fast.py does not show, and what happens without them.

test_fast.py compares them with the reference engine at every scale.
"""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.engines import make_engine
from models import native
from models.cost import count_rows
from models.fast import FastEngine
from models.inference import super_resolve
from models.native import compiler, library
from models.native.bindings import Library, Skip
from models.native.mlp import NativeMLP
from models.native_engine import NativeEngine
from models.reference import ReferenceEngine
from models.routing import FixedRouting, KRouting
from models.sampler import LIIFSampler
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
    monkeypatch.delenv("CC", raising=False)
    source = tmp_path / "source"
    shutil.copytree(compiler.FOLDER, source, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(compiler, "FOLDER", source)
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
@pytest.mark.parametrize("size", [(36, 28), (25, 30), (5, 40), (5, 1300)])
@pytest.mark.parametrize("upsamplers", [2, 3])
def test_cost_is_what_the_kernels_count(size: tuple[int, int], upsamplers: int) -> None:
    """Multiply-adds of pixels, counted where they are done: those that budgets are planned with."""
    model = make_model("carn", upsamplers)
    engine = NativeEngine(loaded(), model)
    lr = torch.rand(1, 3, 9, 7 if size[1] < 1000 else 325)
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
    kernels = compiler.load()
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
@pytest.mark.parametrize(
    ("lr_size", "size"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (5, 7)),
        ((2, 5), (8, 20)),
        ((9, 7), (25, 30)),
        ((9, 7), (4, 3)),
        ((3, 300), (7, 1333)),
        ((3, 513), (9, 1539)),
    ],
)
def test_enlarged_lr_is_that_of_plain_torch(
    lr_size: tuple[int, int], size: tuple[int, int]
) -> None:
    """Also of parts of the rows, and in all of a batch; what was in `out` before is not read."""
    kernels = loaded()
    sampler = make_model("fsrcnn", 3).upsamplers[0]
    mlps = [NativeMLP.pack(sampler, kernels.tile) for _ in range(2)]
    lr, feat = torch.rand(2, 3, *lr_size), torch.rand(2, 12, *lr_size)
    lr[0, 1, -1, -1] = float("nan")
    lr[1, 2, 0, 0] = float("inf")
    grid, classes = grid_of(lr, size), torch.randint(2, (2, *size)).to(torch.uint8)
    expected = grid.bilinear(lr)
    for first, last in ((0, lr_size[0]), (0, 1), (lr_size[0] // 2, lr_size[0])):
        part, rows = grid.part(first, last)
        out = torch.full((2, 3, *part.out_size), float("nan"))
        skip = Skip(lr, classes[:, rows].contiguous(), torch.zeros(3))
        kernels.apply(mlps, feat[:, :, first:last], part, out, skip=skip)
        torch.testing.assert_close(out, expected[:, :, rows], rtol=0, atol=1e-6, equal_nan=True)


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
def test_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.load()
    (path,) = fresh.iterdir()
    written = path.stat().st_mtime_ns
    compiler.load()
    assert [path] == list(fresh.iterdir()) and path.stat().st_mtime_ns == written
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        compiler.load()  # no compiler is asked for
    for name in ("rows.c", "vectors.h"):
        changed = compiler.FOLDER / name
        changed.write_text(changed.read_text() + "\n")
        compiler.load()
    assert len(list(fresh.iterdir())) == 3, "another source is another library"


@has_compiler
@pytest.mark.parametrize("kept", [0, 13, 5000, -1])
def test_a_damaged_library_is_compiled_anew(fresh: Path, kept: int) -> None:
    """Of one that has lost its end, the loader maps pages that a process dies of reading."""
    compiler.load()
    (path,) = fresh.iterdir()
    whole = path.read_bytes()
    path.unlink()  # not the file that this process has mapped
    path.write_bytes(whole[:kept])
    assert compiler._loaded(path) is None
    assert compiler.load().tile > 0
    assert any(compiler._loaded(path) is not None for path in fresh.iterdir())


@has_compiler
def test_the_next_folder_where_one_cannot_be_used(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_folder = compiler.FOLDER / "__pycache__"
    fresh.write_text("a file where the folder should be")
    compiler.load()
    assert len(list(next_folder.iterdir())) == 1
    fresh.unlink()
    fresh.mkdir()
    fresh.chmod(0o777)
    compiler.load()
    assert not list(fresh.iterdir()), "anybody could have put a library there"
    next_folder.chmod(0o777)
    with pytest.raises(UserError, match="no folder of this user's own"):
        compiler.load()


@has_compiler
def test_a_cache_folder_that_may_not_be_looked_at(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    assert library() is None


@has_compiler
def test_cc_may_be_several_words_and_may_be_wrong(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "env LC_ALL=C cc")
    compiler.load()
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    changed = compiler.FOLDER / "rows.c"
    changed.write_text(changed.read_text() + "\n")
    compiler.load()
    assert len(list(fresh.iterdir())) == 2


@has_compiler
@pytest.mark.parametrize("named", ["'", "true", "false"])
def test_a_cc_that_is_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """A quote that does not end, one that writes nothing, one that fails: the usual ones remain."""
    monkeypatch.setenv("CC", named)
    assert compiler.load().tile > 0


def test_a_compiler_that_writes_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(shutil.which("true")))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"true does not compile them .it writes nothing"):
        compiler.load()


def test_without_a_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain torch, and one line that says so."""
    monkeypatch.setenv("PATH", "")
    with caplog.at_level(logging.INFO):
        engines = [make_engine(make_model("fsrcnn")) for _ in range(2)]
    assert {type(engine) for engine in engines} == {FastEngine}
    (line,) = [record.message for record in caplog.records]
    assert "no C compiler (cc, gcc, clang)" in line and "plain torch" in line


@has_compiler
def test_a_compiler_that_fails(fresh: Path) -> None:
    (compiler.FOLDER / "rows.c").write_text("this is not C\n")
    with pytest.raises(UserError, match="does not compile"):
        compiler.load()
    assert not list(fresh.iterdir()), "nothing half-written stays"
    assert library() is None


@has_compiler
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("feat_BChw", torch.zeros(1, 12, 8, 8, dtype=torch.float16)),
        ("feat_BChw", torch.zeros(1, 12, 8, 7)),
        ("out_BOHW", torch.zeros(1, 3, 32, 31)),
        ("classes_BHW", torch.zeros(1, 32, 32, dtype=torch.int64)),
        ("gain_O", torch.zeros(2)),
        ("lr_BOhw", torch.zeros(1, 3, 7, 8)),
        ("lr_BOhw", torch.zeros(1, 3, 8, 9)),
        ("lr_BOhw", torch.zeros(1, 3, 8, 8, dtype=torch.float64)),
    ],
)
def test_other_tensors_than_the_kernels_read_are_refused(name: str, value: torch.Tensor) -> None:
    kernels = loaded()
    mlps = [NativeMLP.pack(sampler, kernels.tile) for sampler in make_model("fsrcnn").upsamplers]
    tensors = {
        "feat_BChw": torch.zeros(1, 12, 8, 8),
        "out_BOHW": torch.zeros(1, 3, 32, 32),
        "lr_BOhw": torch.zeros(1, 3, 8, 8),
        "classes_BHW": torch.zeros(1, 32, 32, dtype=torch.uint8),
        "gain_O": torch.ones(3),
    }
    grid = grid_of(torch.zeros(1, 3, 8, 8), (32, 32))

    def apply(feat: torch.Tensor, out: torch.Tensor, *of_skip: torch.Tensor) -> None:
        kernels.apply(mlps, feat, grid, out, skip=Skip(*of_skip))

    apply(*tensors.values())
    with pytest.raises(ValueError, match=name):
        apply(*{**tensors, name: value}.values())


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_other_types(dtype: torch.dtype) -> None:
    engine = NativeEngine(loaded(), make_model("fsrcnn"))
    lr = torch.rand(1, 3, 8, 8).to(dtype)
    feat, grid = engine.encode(lr.float()), grid_of(lr, (32, 32))
    classes = torch.ones(1, 32, 32, dtype=torch.uint8)
    sr, expected = (engine.upsample(x, feat, grid, classes).sr for x in (lr, lr.float()))
    assert torch.equal(sr, expected)


@has_compiler
@pytest.mark.parametrize("size", [(36, 28), (25, 30)])
def test_batches_features_of_any_layout_and_parts_without_rows(size: tuple[int, int]) -> None:
    model = make_model("carn", 3)
    engine = NativeEngine(loaded(), model)
    lr, grid = torch.rand(3, 3, 9, 7), grid_of(torch.zeros(1, 3, 9, 7), size)
    classes = torch.randint(3, (3, *size), dtype=torch.uint8)
    wide = torch.cat([model.encode(lr), torch.zeros(3, 12, 9, 1)], dim=3)
    feat = wide[..., :7]  # channels first, and not contiguous
    out = engine.upsample(lr, feat, grid, classes)
    margins = engine.classify(feat, grid)[0]
    reference = ReferenceEngine(model)
    expected = reference.upsample(lr, feat, grid, classes)
    torch.testing.assert_close(out.sr, expected.sr, rtol=0, atol=1e-5)
    torch.testing.assert_close(margins, reference.classify(feat, grid)[0], rtol=0, atol=1e-4)
    assert out.pixel_counts == expected.pixel_counts
    shrunk = grid_of(lr, (2, 28))
    empty, rows = shrunk.part(0, 1)
    assert rows == slice(0, 0)
    nothing = engine.upsample(lr[:1], feat[:1, :, :1], empty, classes[:1, :0, :28])
    assert nothing.sr.shape == (1, 3, 0, 28) and nothing.flops == 0


@has_compiler
@pytest.mark.parametrize("size", [(36, 28), (25, 30), (5, 1300)])
@pytest.mark.parametrize("hidden", [[48], [70, 74], [100, 33, 64]])
def test_wide_mlps_in_half_precision(size: tuple[int, int], hidden: list[int]) -> None:
    """All pixels, and those of a class; widths that fill no tile, a batch, scales of all kinds."""
    if not loaded().has_half:
        pytest.skip("needs a processor with AMX")
    spec = {"name": "mlp", "args": {"hidden_list": hidden}}
    torch.manual_seed(0)
    sampler = LIIFSampler(in_dim=13, out_dim=3, imnet_spec=spec)
    mlp, full = (NativeMLP.pack(sampler, loaded().tile, half=half) for half in (True, False))
    w = 7 if size[1] < 1000 else 325
    lr, feat = torch.rand(2, 3, 9, w), torch.randn(2, 13, 9, w)
    feat[1, :, 4, 3] = float("nan")
    grid = grid_of(lr, size)
    everywhere = torch.empty(2, 3, *size)
    loaded().apply([mlp], feat, grid, everywhere)
    expected = sampler.dense(feat, grid)
    assert torch.equal(everywhere.isnan(), expected.isnan()) and expected.isnan().any()
    difference = (everywhere - expected).nan_to_num().norm()
    assert 0 < difference <= 1e-2 * expected.nan_to_num().norm()
    classes = torch.randint(2, (2, *size), dtype=torch.uint8)
    skip, sr = Skip(lr, classes, torch.ones(3)), torch.empty(2, 3, *size)
    loaded().apply([full, mlp], feat, grid, sr, skip=skip)
    chosen = torch.where(classes[:, None] == 0, expected, everywhere)
    torch.testing.assert_close(sr, chosen + grid.bilinear(lr), rtol=0, atol=1e-5, equal_nan=True)


@has_compiler
def test_weights_are_copied() -> None:
    model = make_model("fsrcnn")
    engine = NativeEngine(loaded(), model)
    lr, classes = torch.rand(1, 3, 8, 8), torch.ones(1, 32, 32, dtype=torch.uint8)
    feat, grid = engine.encode(lr), grid_of(lr, (32, 32))
    before = engine.upsample(lr, feat, grid, classes).sr
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(engine.upsample(lr, feat, grid, classes).sr, before)


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
    assert "images are wrong; plain torch is used instead" in caplog.text
