"""benchmarks/learning.py: training side by side, and the script as a user runs it."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import REPOSITORY
from benchmarks.learning_cases import (
    ROUTING_VARIANTS,
    loss_variants,
    optimizer_variants,
    phase0_variants,
    train_routing,
)
from benchmarks.learning_measure import ORDERS
from tests.training import ONE, SOAP, checkpoint_of, make_config, make_pictures, run
from utils.errors import UserError

SCRIPT = REPOSITORY / "benchmarks" / "learning.py"


def test_side_by_side_is_as_in_runs_of_their_own(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", side=64)
    assert run(make_config("fsrcnn-phase0", pictures, iter_max=1), tmp_path / "p0") == 0
    weights = tmp_path / "p0" / "iter_last.pth"
    cosine = {"name": "CosineAnnealingLR_Restart", "args": {"T_period": [3]}}
    changes = {"iter_max": 3, "lr_scheduler": cosine, "microbatches": 1, "init": str(weights)}
    config = make_config("fsrcnn-phase1", pictures, **changes)
    trained = [model.state_dict() for _, model in train_routing(config, weights, 3, ONE.device)]
    for index in (0, 4):
        variant = ROUTING_VARIANTS[index]
        config = make_config(
            "fsrcnn-phase1", pictures, **changes, routing_loss=variant.routing_loss
        )
        assert run(config, tmp_path / str(index)) == 0
        alone = checkpoint_of(tmp_path / str(index))["model"]["sd"]
        for key, value in trained[index].items():
            torch.testing.assert_close(value, alone[key], msg=f"{variant.name}: {key}")


def test_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pictures = make_pictures(tmp_path / "pictures", side=64)
    phase0 = make_config("fsrcnn-phase0", pictures, iter_max=1)
    assert run(phase0, tmp_path / "p0") == 0
    (tmp_path / "hr").mkdir()
    make_pictures(tmp_path / "hr" / "HR", count=1)
    for kind in ("fsrcnn", "fsrcnn-phase0", "fsrcnn-phase1"):
        raw = make_config(kind, pictures).raw
        (tmp_path / f"{kind}.yaml").write_text(json.dumps(raw), encoding="utf-8")
    words = ["--iterations=4", "--device=cpu", f"--hr_data={tmp_path / 'hr' / 'HR'}"]
    words += [f"--phase0_config={tmp_path / 'fsrcnn-phase0.yaml'}", f"--out={tmp_path / 'out'}"]
    words += [f"--config={tmp_path / 'fsrcnn-phase1.yaml'}"]
    words += [f"--optimizer_config={tmp_path / 'fsrcnn.yaml'}"]
    words += [f"--loss_config={tmp_path / 'fsrcnn.yaml'}"]
    words += [f"--weights={tmp_path / 'p0' / 'iter_last.pth'}"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    written = json.loads((tmp_path / "out" / "learning.json").read_text())
    assert [row["variant"] for row in written["routing"]["rows"]] == [
        variant.name for variant in ROUTING_VARIANTS
    ]
    assert set(written["routing"]["rows"][0]["hr"]["orders"]) == set(ORDERS)
    assert [row["variant"] for row in written["phase0"]["rows"]] == [
        variant.name for variant in phase0_variants(phase0, 4)
    ]
    rows = written[f"optimizers/{tmp_path / 'fsrcnn.yaml'}"]["rows"]
    assert len({row["hr"] for row in rows}) == len(rows), "all of them train"
    assert [row["variant"] for row in rows] == [
        variant.name for variant in optimizer_variants(phase0, 4)
    ]
    assert all(row["iterations_per_s"] > 0 and row["hr"] > 0 for row in rows)
    losses = written["losses"]["rows"]
    assert [row["variant"] for row in losses] == [v.name for v in loss_variants(phase0, 4)]
    assert len({row["hr"] for row in losses}) == len(losses), "each by its own loss"
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    for part in written.values():
        assert part["command"] in page


def test_wrong_configs_of_optimisers_are_named(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", side=64)
    for config in (
        make_config("fsrcnn-phase1", pictures),
        make_config("fsrcnn", pictures, optimizer=SOAP),
        make_config("fsrcnn", pictures, optimizer={"name": "adam"}),
    ):
        with pytest.raises(UserError, match="an original network or of phase 0, whose optimizer"):
            optimizer_variants(config, 1)


def test_pixel_losses_need_a_config_and_iterations_that_can_tell_them_apart(tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path / "pictures", side=64)
    with pytest.raises(UserError, match=r"an original network or of phase 0$"):
        loss_variants(make_config("fsrcnn-phase1", pictures), 100)
    with pytest.raises(UserError, match="4 iterations or more"):
        loss_variants(make_config("fsrcnn", pictures), 3)
