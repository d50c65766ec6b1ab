"""An image up to where its pixels are routed, so that many routings can be tried on it.

Axes: B patches of *one* image (or the image), M upsamplers, K = M - 1, h w LR, H W output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.restore import PcsrRestorer
from models.cost import ImageCost
from models.grid import PixelGrid
from models.patches import PatchCanvas, patch_corners
from utils.machine import Timer


@dataclass(frozen=True)
class _Task:
    """What goes through the upsamplers at once: a run of rows, or a batch of patches."""

    lr: Tensor
    feat: Tensor
    grid: PixelGrid


class PreparedImage:
    """Features and margins of an image, computed as the restorer itself would.

    Args:
        restorer: the model, and how images are worked on.
        lr: (3, h, w) float RGB in [0, 1] on the model's device.
        size: (H, W) of the output.

    Attributes:
        image: what it costs.
        margins_BKHW: see `models.routing`.
        before_s: what encoder and classifier took.
    """

    def __init__(self, restorer: PcsrRestorer, lr: Tensor, size: tuple[int, int]) -> None:
        lr_size = (lr.shape[-2], lr.shape[-1])
        self.image: ImageCost = restorer.image_cost(lr_size, size)
        self._engine = restorer.engine
        self._size = size
        self._corners: list[tuple[int, int]] | None = None
        with Timer(lr.device) as timer:
            if restorer.works_whole(lr_size):
                tasks = self._runs(lr)
            else:
                assert restorer.patches is not None
                corners, _ = patch_corners(lr_size, restorer.patches.size, restorer.patches.step)
                self._corners = [
                    (y * size[0] // lr_size[0], x * size[1] // lr_size[1]) for y, x in corners
                ]
                tasks = self._batches(lr, corners, restorer.patches.batch_size)
            margins = [self._engine.classify(task.feat, task.grid)[0] for task in tasks]
            self.margins_BKHW = torch.cat(margins, dim=2 if self._corners is None else 0)
        self._tasks = tasks
        self.before_s = timer.elapsed_s

    def upsample(self, classes_BHW: Tensor) -> tuple[Tensor, float]:
        """Each pixel through the upsampler of its class: (B, 3, H, W), and the seconds it took."""
        axis = 1 if self._corners is None else 0
        lengths = [
            task.grid.rows.out_len if self._corners is None else len(task.feat)
            for task in self._tasks
        ]
        with Timer(classes_BHW.device) as timer:
            parts = [
                self._engine.upsample(task.lr, task.feat, task.grid, classes).sr
                for task, classes in zip(
                    self._tasks, classes_BHW.split(lengths, dim=axis), strict=True
                )
            ]
        return torch.cat(parts, dim=2 * axis), timer.elapsed_s

    def cut(self, image_CHW: Tensor) -> Tensor:
        """A whole image in the patches of this one: (B, C, H, W)."""
        if self._corners is None:
            return image_CHW[None]
        height, width = self.image.size
        return torch.stack([image_CHW[:, y : y + height, x : x + width] for y, x in self._corners])

    def whole(self, sr_B3HW: Tensor) -> Tensor:
        """The image (3, H, W) of its patches, whose overlaps are averaged."""
        if self._corners is None:
            return sr_B3HW[0]
        canvas = PatchCanvas(self._size, sr_B3HW)
        for corner, patch in zip(self._corners, sr_B3HW, strict=True):
            canvas.add(corner, patch)
        return canvas.mean()[0]

    def _runs(self, lr: Tensor) -> list[_Task]:
        grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), self._size, lr.device)
        tasks, first = [], 0
        for feat in self._engine.encode_rows(lr[None]):
            part, _ = grid.part(first, first + feat.shape[2])
            tasks.append(_Task(lr[None], feat, part))
            first += feat.shape[2]
        return tasks

    def _batches(self, lr: Tensor, corners: list[tuple[int, int]], batch_size: int) -> list[_Task]:
        h, w = self.image.lr_size
        grid = PixelGrid.build((h, w), self.image.size, lr.device)
        patches = torch.stack([lr[:, y : y + h, x : x + w] for y, x in corners])
        return [
            _Task(batch, self._engine.encode(batch), grid) for batch in patches.split(batch_size)
        ]
