"""Validation while training: whole images, no refinement, shared out over the ranks."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.data import rank_share
from engine.restore import OriginalRestorer, PcsrRestorer, Restored
from models.backbones.base import SRNetwork
from models.pcsr import PCSR
from models.routing import FixedRouting, KRouting
from utils.distributed import World, gather_objects
from utils.metrics import PsnrType, psnr

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationRow:
    """One way of running the model on the validation images.

    Attributes:
        name: "sr" for models without a classifier; "k0" and "heavy" for those with one.
        psnr: mean PSNR in dB.
        gflops: mean GFLOPs in the paper's convention.
        heavy_share: share of pixels that the heaviest upsampler computed.
    """

    name: str
    psnr: float
    gflops: float
    heavy_share: float


@torch.inference_mode()
def validate(
    model: nn.Module,
    sets: Iterable[tuple[float, Dataset]],
    *,
    psnr_type: PsnrType,
    world: World,
) -> list[tuple[float, list[ValidationRow]]]:
    """Evaluate `model` on every set; every rank gets the same result.

    Returns:
        (scale, rows) per set.
    """
    was_training = model.training
    model.eval()
    restorers = _restorers(model)
    results = []
    for scale, samples in sets:
        figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in restorers}
        for _, sample in rank_share(samples, world):
            lr, hr = sample["lr"].to(world.device), sample["hr"].to(world.device)
            for name, restore in restorers.items():
                figures[name].append(_figures(restore, lr, hr, psnr_type))
        shares = gather_objects(figures)
        rows = []
        for name in restorers:
            values = torch.tensor([v for share in shares for v in share[name]]).mean(dim=0)
            rows.append(ValidationRow(name, *values.tolist()))
        results.append((scale, rows))
    model.train(was_training)
    return results


def _restorers(model: nn.Module) -> dict[str, Callable[[Tensor, tuple[int, int]], Restored]]:
    if not isinstance(model, PCSR):
        assert isinstance(model, SRNetwork)
        restorer = OriginalRestorer(model)
        return {"sr": lambda lr, _size: restorer(lr)}
    if model.classifier is None:
        return {"sr": PcsrRestorer(model, FixedRouting(-1), refinement=False)}
    return {
        "k0": PcsrRestorer(model, KRouting(0.0), refinement=False),
        "heavy": PcsrRestorer(model, FixedRouting(-1), refinement=False),
    }


def _figures(
    restore: Callable[[Tensor, tuple[int, int]], Restored],
    lr: Tensor,
    hr: Tensor,
    psnr_type: PsnrType,
) -> tuple[float, float, float]:
    """PSNR in dB, GFLOPs (paper) and share of heavy pixels of one image."""
    size = (hr.shape[-2], hr.shape[-1])
    border_px = round((size[0] / lr.shape[-2] + size[1] / lr.shape[-1]) / 2)
    restored = restore(lr, size)
    heavy_share = restored.shares[-1] if restored.shares else 1.0
    figure = psnr(restored.sr, hr, psnr_type=psnr_type, border_px=border_px)
    return figure, restored.flops_paper / 1e9, heavy_share
