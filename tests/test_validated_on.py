"""Which validation figures can be compared."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import models
from engine.data import validation_sets
from engine.validation import validate, validated_on
from tests.training import ONE, model_spec
from utils.config import DataConfig
from utils.metrics import PsnrType


def test_what_a_run_is_validated_on(pictures: Path, tmp_path: Path) -> None:
    """Images, LR and channels; not how the same images are named or cached."""
    data = DataConfig(
        dataset={"name": "image-folder", "args": {"root_path": str(pictures)}},
        wrapper={"name": "sr-implicit-downsampled", "args": {"scale": 4}},
    )

    def name(psnr_type: PsnrType = "rgb", **changes: Any) -> str:
        args = {**data.dataset["args"], **changes.pop("args", {})}
        changed = replace(data, dataset={**data.dataset, "args": args}, **changes)
        return validated_on(validation_sets(changed), psnr_type)

    shutil.copytree(pictures, tmp_path / "copy")
    elsewhere = {"root_path": str(tmp_path / "copy"), "cache": "none"}
    assert name(args=elsewhere) == name(scales=[4.0], num_workers=2) == name()
    others = [name("y"), name(scales=[3.0]), name(args={"first_k": 1})]
    others.append(name(wrapper={**data.wrapper, "args": {"scale": 4, "lr_mode": "uint8"}}))
    next((tmp_path / "copy").iterdir()).unlink()
    others.append(name(args=elsewhere))
    assert len({name(), *others}) == 1 + len(others)


@pytest.mark.parametrize("is_training", [True, False])
def test_a_validation_leaves_the_model_in_its_mode(is_training: bool) -> None:
    """Batch norm would go on with its running statistics."""
    model = models.make(model_spec("fsrcnn")).train(is_training)
    assert validate(model, [], psnr_type="rgb", world=ONE) == []
    assert all(module.training == is_training for module in model.modules())
