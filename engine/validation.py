"""Validation while training: whole images, no refinement, shared out over the ranks."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from engine.data import rank_share
from models.inference import super_resolve
from models.pcsr import PCSR
from models.routing import FixedRouting, KRouting, Routing
from utils.distributed import World, gather_objects
from utils.flops import PcsrCost, paper_flops
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
    routings: dict[str, Routing] = {"sr": FixedRouting(-1)}
    if isinstance(model, PCSR) and model.classifier is not None:
        routings = {"k0": KRouting(0.0), "heavy": FixedRouting(-1)}
    cost = PcsrCost.of(model) if isinstance(model, PCSR) else None
    results = []
    for scale, samples in sets:
        figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in routings}
        for _, sample in rank_share(samples, world):
            lr = sample["lr"][None].to(world.device)
            hr = sample["hr"][None].to(world.device)
            for name, routing in routings.items():
                figures[name].append(_figures(model, cost, lr, hr, routing, psnr_type))
        shares = gather_objects(figures)
        rows = []
        for name in routings:
            values = torch.tensor([v for share in shares for v in share[name]]).mean(dim=0)
            rows.append(ValidationRow(name, *values.tolist()))
        results.append((scale, rows))
    model.train(was_training)
    return results


def _figures(
    model: nn.Module,
    cost: PcsrCost | None,
    lr: Tensor,
    hr: Tensor,
    routing: Routing,
    psnr_type: PsnrType,
) -> tuple[float, float, float]:
    size = (hr.shape[-2], hr.shape[-1])
    border_px = round((size[0] / lr.shape[-2] + size[1] / lr.shape[-1]) / 2)
    if isinstance(model, PCSR) and cost is not None:
        lr_size = (lr.shape[-2], lr.shape[-1])
        log_costs = cost.log_costs(lr_size, size)
        result = super_resolve(model, lr, size, routing, log_costs, refinement=False)
        sr, share = result.sr, result.pixel_counts[-1] / sum(result.pixel_counts)
        flops = cost.paper_total(lr_size, result.pixel_counts)
    else:
        sr, share = model(lr), 1.0
        flops = paper_flops(model, lr)
    return psnr(sr[0], hr[0], psnr_type=psnr_type, border_px=border_px), flops / 1e9, share
