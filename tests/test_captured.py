"""A step as a CUDA graph: when it is recorded, and that it gives what it gives without one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import captured
from engine.captured import CapturedStep, Step
from tests.training import checkpoint_of, make_config, run
from utils.distributed import World
from utils.errors import UserError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_captured_steps_are_for_gpus(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`compile: capture` is for CUDA GPUs: on `cpu` take"):
        run(make_config("fsrcnn", pictures, compile="capture"), tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done, in place of doing it on a GPU."""
    done: list[str] = []

    class Graph:
        def __init__(self, compute: Any, lr: Tensor, hr: Tensor) -> None:
            done.append(f"record {len(lr)}")
            self._compute = compute

        def __call__(self, lr: Tensor, hr: Tensor) -> Step:
            done.append(f"replay {len(lr)}")
            return self._compute(lr, hr)

    def eager(compute: Any, lr: Tensor, hr: Tensor) -> Step:
        done.append(f"eager {len(lr)}")
        return compute(lr, hr)

    monkeypatch.setattr(captured, "_Graph", Graph)
    monkeypatch.setattr(captured, "_on_another_stream", eager)
    return done


def compute(lr: Tensor, hr: Tensor) -> Step:
    """The least step."""
    return {"loss": (lr.sum() - hr.sum())}, []


def call(step: CapturedStep, size: int) -> None:
    """A step on `size` samples, checked."""
    lr, hr = torch.rand(size, 3, 2, 2), torch.rand(size, 3, 4, 4)
    assert step(lr, hr)[0] == compute(lr, hr)[0]


def test_each_size_is_recorded_after_a_few_steps(calls: list[str]) -> None:
    step = CapturedStep(compute)
    for size in (1, 2, 1, 1, 1, 2, 1):
        call(step, size)
    assert calls[:4] == ["eager 1", "eager 2", "eager 1", "eager 1"]
    assert calls[4:] == ["record 1", "replay 1", "eager 2", "replay 1"]


def test_only_so_many_sizes_are_recorded(calls: list[str]) -> None:
    step = CapturedStep(compute)
    for _ in range(5):
        for size in range(1, 11):
            call(step, size)
    assert sum(name.startswith("record") for name in calls) == 8
    assert calls.count("eager 9") == calls.count("eager 10") == 5


def test_what_cannot_be_recorded_goes_on_without(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(captured, "_Graph", fail)
    step = CapturedStep(compute)
    for _ in range(6):
        call(step, 1)
    assert calls == ["eager 1"] * 6
    assert caplog.text.count("`compile: capture` does not work") == 1
    assert "when stream is capturing" in caplog.text and "more" not in caplog.text


@needs_cuda
@pytest.mark.parametrize("kind", ["fsrcnn", "carn", "fsrcnn-phase0", "carn-phase1"])
def test_recorded_training_equals_eager_training(
    kind: str, pictures: Path, tmp_path: Path, phase0: Any, caplog: pytest.LogCaptureFixture
) -> None:
    device = World(0, 1, torch.device("cuda", torch.cuda.current_device()))
    phase0(kind)
    found = []
    for mode in ("none", "capture"):
        config = make_config(kind, pictures, compile=mode, iter_max=12)
        run(config, tmp_path / mode, device)
        found.append(checkpoint_of(tmp_path / mode)["model"]["sd"])
    assert "does not work" not in caplog.text
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-3, msg=name)
