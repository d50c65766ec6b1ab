"""LR to any output size with a model that was trained at one scale.

Axes: h w LR, H W output.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.resize import imresize
from engine.evaluation import Restore
from engine.restore import Restored
from utils.errors import UserError
from utils.image_decoding import MAX_PIXELS
from utils.machine import Timer

MODEL_SCALE = 4.0


class Enlarger:
    """Enlarges with PCSR at the scale that it was trained at; a resize does the rest.

    A PCSR model computes any size, but away from its scale it was never taught to. Measured with
    the published CARN-PCSR (trained at x4), mean RGB PSNR in dB of four Set5 images' top left
    256x256, as bicubic / the network at the asked size / the network at x4, then bicubic:
    x2 30.7 / 31.3 / 34.8; x3 27.5 / 30.7 / 31.4; x8 21.7 / 23.7 / 24.0.

    Args:
        restore: a PCSR network with its routing.
        model_scale: that it was trained at; None where it was trained at many, so that it
            computes every size itself.
    """

    def __init__(self, restore: Restore, model_scale: float | None = MODEL_SCALE) -> None:
        self.restore = restore
        self.model_scale = model_scale

    @torch.inference_mode()
    def __call__(self, lr: Tensor, size: tuple[int, int]) -> Restored:
        """`lr` (3, h, w) float RGB in [0, 1] on the model's device to SR of `size` (H, W).

        FLOPs and shares are those of the size that the network computed; the resize is in the time.
        """
        computed = self.computed_size((lr.shape[-2], lr.shape[-1]), size)
        restored = self.restore(lr, computed)
        if computed == size:
            return restored
        assert restored.classes is not None
        with Timer(lr.device) as timer:
            # Channel by channel: what a resize needs beside its result is as large as that.
            sr = torch.cat(
                [imresize(plane, size=size) for plane in restored.sr.clamp_(0, 1).split(1)]
            )
        classes = F.interpolate(restored.classes[None, None].float(), size, mode="nearest-exact")
        return replace(
            restored,
            sr=sr,
            classes=classes[0, 0].to(restored.classes.dtype),
            time_s=restored.time_s + timer.elapsed_s,
        )

    def computed_size(self, lr_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """The size (H, W) that the network itself computes for an output of `size`.

        Raises:
            UserError: more pixels than any picture may have.
        """
        if self.model_scale is None:
            return size
        height, width = (max(1, round(length * self.model_scale)) for length in lr_size)
        if height * width > MAX_PIXELS:
            raise UserError(
                f"the network would compute {width}x{height} pixels, x{self.model_scale:g}, more "
                f"than {MAX_PIXELS} in all: cut the picture into parts"
            )
        return height, width
