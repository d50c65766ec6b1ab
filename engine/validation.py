"""Validation while training: whole images, no refinement, shared out over the ranks."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.data import rank_share
from engine.evaluation import Restore
from engine.restore import OriginalRestorer, PcsrRestorer, Restored
from engine.validation_picture import panels
from engine.validation_sizes import border_of
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from models.routing import FixedRouting, KRouting
from utils.distributed import World, gather_objects, together
from utils.metrics import PsnrType, psnr

# The row in which the classifier decides.
BY_CLASSIFIER = "k0"


@dataclass(frozen=True)
class ValidationRow:
    """One way of running the model on the validation images.

    Attributes:
        name: "sr" for models without a classifier; "k0" and "heavy" for those with one.
        psnr: mean PSNR in dB.
        gflops: mean GFLOPs in the paper's convention.
        heavy_share: share of pixels that the heaviest upsampler computed; 1 for an original.
        picture: of the first image, (.., .., 3) uint8, see `engine.validation_picture`.
    """

    name: str
    psnr: float
    gflops: float
    heavy_share: float
    picture: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)


def validated_on(sets: Iterable[tuple[float, Dataset]], psnr_type: PsnrType) -> str:
    """Short name of the images that are validated on, how LR is made, and the channels.

    Figures of runs, or of parts of a run, can be compared where it is the same. Of an image, name
    and size of its files count, not where they are.
    """
    about: list[Any] = [psnr_type]
    for scale, samples in sets:
        source = getattr(samples, "dataset", None)
        files = [
            [(path.name, path.stat().st_size if path.exists() else 0) for path in column]
            for column in getattr(source, "columns", [])
        ]
        how = [getattr(samples, name, None) for name in ("inp_size", "lr_mode")]
        about.append([scale, type(samples).__name__, len(samples), how, files])  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]


class _Figures(NamedTuple):
    """Of one image; `picture` of the first one only."""

    psnr: float
    gflops: float
    heavy_share: float
    picture: NDArray[np.uint8] | None


@torch.inference_mode()
def validate(
    model: nn.Module,
    sets: Iterable[tuple[float, Dataset]],
    *,
    psnr_type: PsnrType,
    world: World,
) -> list[tuple[float, list[ValidationRow]]]:
    """Evaluate `model` on every set; every rank gets the result that one process would get.

    Returns:
        (scale, rows) per set.

    Raises:
        UserError: an image that cannot be read, or a model whose scale is not the image's.
    """
    was_training = model.training
    model.eval()
    restorers = _restorers(model)
    results = []
    for scale, samples in sets:
        share = together(partial(_rank_figures, restorers, samples, psnr_type, world))
        # In the order of the images, whichever rank had them: sums then round alike.
        gathered = sorted(chain(*gather_objects(share)), key=lambda pair: pair[0])
        images = [row for _, row in gathered]
        rows = []
        for column, name in enumerate(restorers):
            psnrs, gflops, heavy, pictures = zip(*(image[column] for image in images), strict=True)
            means = (fmean(psnrs), fmean(gflops), fmean(heavy))
            rows.append(ValidationRow(name, *means, pictures[0]))
        results.append((scale, rows))
    model.train(was_training)
    return results


def _rank_figures(
    restorers: dict[str, Restore], samples: Dataset, psnr_type: PsnrType, world: World
) -> list[tuple[int, list[_Figures]]]:
    """Index of each of this rank's images, and its figures by each restorer."""
    figures = []
    for index, sample in rank_share(samples, world):
        lr, hr = sample["lr"].to(world.device), sample["hr"].to(world.device)
        of_image = []
        for name, restore in restorers.items():
            restored = restore(lr, (hr.shape[-2], hr.shape[-1]))
            picture = None
            if index == 0:
                picture = panels(lr, restored, with_classes=name == BY_CLASSIFIER)
            of_image.append(_figures(restored, lr, hr, psnr_type, picture))
        figures.append((index, of_image))
    return figures


def _restorers(model: nn.Module) -> dict[str, Restore]:
    if not isinstance(model, PCSR):
        assert isinstance(model, SRNetwork)
        return {"sr": OriginalRestorer(model, checked=False)}
    if model.classifier is None:
        return {"sr": PcsrRestorer(model, FixedRouting(-1), refinement=False, checked=False)}
    return {
        BY_CLASSIFIER: PcsrRestorer(model, KRouting(0.0), refinement=False, checked=False),
        "heavy": PcsrRestorer(model, FixedRouting(-1), refinement=False, checked=False),
    }


def _figures(
    restored: Restored,
    lr: Tensor,
    hr: Tensor,
    psnr_type: PsnrType,
    picture: NDArray[np.uint8] | None,
) -> _Figures:
    border_px = border_of((hr.shape[-2], hr.shape[-1]), (lr.shape[-2], lr.shape[-1]))
    heavy_share = restored.shares[-1] if restored.shares else 1.0
    figure = psnr(restored.sr, hr, psnr_type=psnr_type, border_px=border_px)
    return _Figures(figure, restored.flops_paper / 1e9, heavy_share, picture)
