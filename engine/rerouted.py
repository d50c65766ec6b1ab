"""An image whose pixels are routed again and again: everything before and behind it is kept.

Axes: B = 1, M upsamplers, H W output.
"""

import math

import torch
from torch import Tensor

from engine.prepared import PreparedImage
from engine.restore import PcsrRestorer, Restored
from models.budget import BudgetRouting
from models.cost import count_rows
from models.refinement import refine
from models.routing import Routing


class ReroutedImage:
    """One whole image: its features and every upsampler's output are computed once.

    What a routing gives is what the restorer itself gives with it, up to rounding.

    Args:
        restorer: the model, for whole images; its own routing plays no part.
        lr: (3, h, w) float RGB in [0, 1] on the model's device.
        size: (H, W) of the output.
    """

    @torch.inference_mode()
    def __init__(self, restorer: PcsrRestorer, lr: Tensor, size: tuple[int, int]) -> None:
        lr_size = (lr.shape[-2], lr.shape[-1])
        self._restorer = restorer
        self._prepared = prepared = PreparedImage(restorer, lr, size)
        self._log_costs = restorer.cost.log_costs(lr_size, size)
        self._costs = {
            is_global: restorer.image_cost(lr_size, size, is_global=is_global)
            for is_global in (True, False)
        }
        self._sr_M = [
            prepared.upsample(torch.full((1, *size), index, dtype=torch.uint8, device=lr.device))[0]
            for index in range(len(self._log_costs))
        ]

    @torch.inference_mode()
    def __call__(self, routing: Routing, *, refinement: bool | None = None) -> Restored:
        """The picture that a routing makes, and its cost; the time is nan: nothing was run.

        Args:
            refinement: default the restorer's.
        """
        classes_1HW = routing.classes(self._prepared.margins_BKHW, self._log_costs)
        sr_13HW = self._sr_M[0]
        for index, other in enumerate(self._sr_M[1:], start=1):
            sr_13HW = torch.where(classes_1HW[:, None] == index, other, sr_13HW)
        if self._restorer.refinement if refinement is None else refinement:
            sr_13HW = refine(sr_13HW, classes_1HW)
        image = self._costs[routing.is_global]
        counts_1HM = count_rows(classes_1HW, len(self._sr_M))
        pixels_M = counts_1HM.sum(axis=(0, 1))
        return Restored(
            sr=self._prepared.whole(sr_13HW),
            classes=classes_1HW[0],
            shares=(pixels_M / pixels_M.sum()).tolist(),
            flops_paper=self._restorer.cost.paper_total(image.lr_size, pixels_M.tolist()),
            flops_executed=round(image.cost.total(counts_1HM)),
            time_s=math.nan,
        )


def part_way(
    restorer: PcsrRestorer, lr_size: tuple[int, int], size: tuple[int, int], share: float
) -> BudgetRouting:
    """The budget that lies `share` of the way from all-light to all-heavy, in executed FLOPs.

    Args:
        restorer: what will run an image of (h, w) to (H, W).
    """
    image = restorer.image_cost(lr_size, size)
    light, heavy = image.uniform(0), image.uniform(-1)
    words = f"{share:.0%} of the way from all-light to all-heavy"
    return BudgetRouting(image.cost, light + share * (heavy - light), words)
