"""Networks as ONNX files: what another runtime makes of them is what PyTorch makes."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from benchmarks import exported
from engine import export
from engine.restore import OriginalRestorer, PcsrRestorer
from models.pcsr import PCSR
from models.routing import FixedRouting, KRouting
from tests.test_models import SMALL, original, pcsr
from utils.checkpoint import save_checkpoint
from utils.cli import run
from utils.errors import UserError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# (B, h, w), k
CASES = [((1, 9, 7), 0.0), ((2, 6, 11), 0.4), ((1, 1, 1), 0.0), ((1, 2, 5), -1e9), ((1, 8, 8), 1e9)]


def session_of(exported: export.Exported, path: Path) -> Any:
    export.write(exported, path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def undecided(upsamplers: int, backbone: str = "carn") -> PCSR:
    """A small PCSR whose pixels go to all its upsamplers, which differ by much."""
    torch.manual_seed(upsamplers)
    model = pcsr(upsamplers, backbone).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    last = model.classifier.imnet.linears[-1] if model.classifier else None
    if last is not None:
        lr = torch.rand(1, 3, 16, 16)
        with torch.no_grad():
            _, logits = model.outputs(lr, (64, 64))
            last.bias.sub_(logits.mean(dim=(0, 2, 3)))
            last.weight.mul_(20)
            last.bias.mul_(20)
    return model


def pictures(batch: int, h: int, w: int) -> Tensor:
    return torch.rand(batch, 3, h, w, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("upsamplers", "scale", "refinement"), [(2, 4, True), (3, 3, False)])
def test_routing_inside_the_file_is_the_reference_engines(
    upsamplers: int, scale: int, refinement: bool, tmp_path: Path
) -> None:
    model = undecided(upsamplers)
    session = session_of(export.of_pcsr(model, scale, refinement=refinement), tmp_path / "a.onnx")
    seen = set()
    for (batch, h, w), k in CASES:
        lr = pictures(batch, h, w)
        inputs = {"lr": lr.numpy(), "k": np.array([k], np.float32)}
        sr, classes = session.run(["sr", "classes"], inputs)
        restore = PcsrRestorer(model, KRouting(k), refinement=refinement, engine="reference")
        for i, image in enumerate(lr):
            expected = restore(image, (scale * h, scale * w))
            assert expected.classes is not None and classes.dtype == np.uint8
            assert np.array_equal(classes[i], expected.classes)
            np.testing.assert_allclose(sr[i], expected.sr, rtol=0, atol=1e-5)
        seen |= set(np.unique(classes).tolist()) if abs(k) < 1 else set()
    assert seen == set(range(upsamplers))


@pytest.mark.parametrize(("upsamplers", "index"), [(1, None), (2, 0)])
def test_one_upsampler_for_all_pixels(upsamplers: int, index: int | None, tmp_path: Path) -> None:
    model = undecided(upsamplers)
    session = session_of(export.of_pcsr(model, 2, index), tmp_path / "a.onnx")
    assert [each.name for each in session.get_inputs()] == ["lr"]
    for (batch, h, w), _ in CASES[:3]:
        lr = pictures(batch, h, w)
        (sr,) = session.run(None, {"lr": lr.numpy()})
        restore = PcsrRestorer(model, FixedRouting(index or 0), engine="reference")
        for i, image in enumerate(lr):
            expected = restore(image, (2 * h, 2 * w)).sr
            np.testing.assert_allclose(sr[i], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", SMALL)
def test_originals_of_every_backbone(backbone: str, tmp_path: Path) -> None:
    model = original(backbone, 4).eval()
    session = session_of(export.of_original(model), tmp_path / "a.onnx")
    for (batch, h, w), _ in CASES[:3]:
        lr = pictures(batch, h, w)
        (sr,) = session.run(None, {"lr": lr.numpy()})
        for i, image in enumerate(lr):
            np.testing.assert_allclose(sr[i], OriginalRestorer(model)(image).sr, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["fsrcnn", "srresnet", "rcan"])
def test_backbones_below_the_routing(backbone: str, tmp_path: Path) -> None:
    model = undecided(2, backbone)
    session = session_of(export.of_pcsr(model, 4), tmp_path / "a.onnx")
    lr = pictures(1, 14, 9)
    sr, classes = session.run(None, {"lr": lr.numpy(), "k": np.zeros(1, np.float32)})
    expected = PcsrRestorer(model, engine="reference")(lr[0], (56, 36))
    assert expected.classes is not None and 0 < expected.shares[1] < 1
    assert np.array_equal(classes[0], expected.classes)
    np.testing.assert_allclose(sr[0], expected.sr, rtol=0, atol=1e-5)


def test_what_is_in_a_file(tmp_path: Path) -> None:
    session_of(export.of_pcsr(undecided(2), 4), tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    # Pixels are numbered in integers only: float32 does not tell those beyond 2^24 apart.
    assert {"NonZero", "ScatterND"} <= {node.op_type for node in model.graph.node}
    assert not {"Mod", "Floor"} & {node.op_type for node in model.graph.node}
    # Nothing of the machine that it was made on.
    assert str(Path(export.__file__).parent.parent) not in str(model)
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [
        ["batch", 3, "height", "width"],
        [1],
        ["batch", 3, "4*height", "4*width"],
        ["batch", "4*height", "4*width"],
    ]


def test_a_file_that_gives_other_pictures_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, path = export.of_pcsr(undecided(2), 2), tmp_path / "a.onnx"
    path.write_bytes(b"before")
    to_onnx = torch.onnx.export

    def export_and_change(*args: Any, **more: Any) -> Any:
        program = to_onnx(*args, **more)
        bias = exported.graph.get_parameter("upsamplers.0.rest.0.bias")
        layer = exported.graph.get_submodule("upsamplers.0.rest.0")
        layer.register_parameter("bias", torch.nn.Parameter(bias + 0.01))
        return program

    monkeypatch.setattr(torch.onnx, "export", export_and_change)
    with pytest.raises(UserError, match="onnxruntime makes other pictures of the ONNX file"):
        export.write(exported, path)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"before"]


def test_values_of_any_size_are_compared_but_no_numbers_are(tmp_path: Path) -> None:
    model = undecided(1)
    last = model.upsamplers[-1].imnet.linears[-1]
    with torch.no_grad():
        last.weight.mul_(1e5)
    difference = export.write(export.of_pcsr(model, 2), tmp_path / "a.onnx")
    assert difference is not None and difference < 1e-4
    with torch.no_grad():
        last.bias.fill_(float("inf"))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        export.write(export.of_pcsr(model, 2), tmp_path / "b.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_runtime_that_cannot_run_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported model\nIR version")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(UserError, match="uninstall it: Unsupported model IR version"):
        export.write(export.of_original(original("fsrcnn", 4)), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_benchmark_of_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backbone=fsrcnn", "--size=16x12", "--rounds=1", "--threads=1"]
    monkeypatch.setattr("sys.argv", ["exported", *words])
    exported.main()
    *_, size, _, original, k0, k1, heavy, light = capsys.readouterr().out.splitlines()
    assert size == "LR 16x12"
    rows = [line.split() for line in (original, k0, k1, heavy, light)]
    assert [row[0] for row in rows] == ["original", "k0", "k1", "heavy", "light"]
    assert rows[0][2] == "1.00" and [rows[3][4], rows[4][4]] == ["100.0", "0.0"]
    assert all(row[3].isdigit() for row in rows)


# The command line


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs it; gives exit code, standard output and error."""

    def call(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr("sys.argv", ["export", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run(export.main)
        return (ended.value.code, *capsys.readouterr())

    yield call


CONFIG = "configs/cpu/fsrcnn-pcsr-small-phase1.yaml"


def test_command_writes_a_file_that_says_what_it_is(command: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "small.onnx"
    code, out, err = command("--config", CONFIG, "--output", path, "--no_refinement")
    assert (code, err) == (0, "")
    assert out.startswith(
        f"{path}: fsrcnn-pcsr-small-phase1 from save/fsrcnn-pcsr-small-phase1/release.pth, x4, "
        f"lr, k -> sr, classes, 0."
    )
    assert "onnxruntime differs from PyTorch by " in out
    about = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert about["scale"] == "4" and about["refinement"] == "false"
    assert (about["config"], about["backbone"]) == ("fsrcnn-pcsr-small-phase1", "fsrcnn")
    assert [each.name for each in path.parent.iterdir()] == ["small.onnx"]


@pytest.mark.parametrize("args", ["", "\n  args:"])
def test_a_config_need_not_give_arguments(args: str, command: Any, tmp_path: Path) -> None:
    config, weights = tmp_path / "plain.yaml", tmp_path / "plain.pth"
    config.write_text(f"model:\n  name: fsrcnn{args}\n")
    spec: dict[str, Any] = {"name": "fsrcnn", "args": {}}
    save_checkpoint(weights, {"model": {**spec, "sd": models.make(spec).state_dict()}})
    path = tmp_path / "a.onnx"
    code, _, err = command("--config", config, "--weights", weights, "--output", path)
    assert (code, err) == (0, "") and path.is_file()


def test_where_packages_are_missing_it_says_so(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, missing = importlib.util.find_spec, {"onnxruntime"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    words = ("--config", "configs/fsrcnn-x4.yaml", "--output", tmp_path / "a.onnx")
    code, out, _ = command(*words)
    assert code == 0 and "not compared with PyTorch: onnxruntime is not installed" in out
    missing.add("onnxscript")
    before = (tmp_path / "a.onnx").read_bytes()
    assert command(*words) == (
        2,
        "",
        "error: ONNX files need more packages: pip install onnx onnxscript\n",
    )
    assert (tmp_path / "a.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("configs/fsrcnn-x4.yaml", ["--scale", "2"], "--scale 2: the network is for x4"),
        ("configs/fsrcnn-x4.yaml", ["--upsampler", "heavy"], "has none to choose from"),
        ("configs/fsrcnn-x4.yaml", ["--no_refinement"], "has no borders to refine"),
        (CONFIG, ["--scale", "65"], "--scale 65: 64 is the most that a file can have"),
        (CONFIG, ["--upsampler", "2"], "--upsampler 2: the model has 2, counted from 0"),
        (CONFIG, ["--scale", "0"], "expected a whole number, at least 1, not `0`"),
        (CONFIG, ["--output", "a.pth"], "expected a name that ends in .onnx, not `a.pth`"),
    ],
)
def test_wrong_words_are_one_line(
    config: str, words: list[str], said: str, command: Any, tmp_path: Path
) -> None:
    code, out, err = command("--config", config, "--output", tmp_path / "a.onnx", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err and not list(tmp_path.iterdir())
