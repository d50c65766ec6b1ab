"""The published demo: a photograph is HR, LR is made of it, and both models restore it.

Axes: h w LR, H W output.
"""

from dataclasses import dataclass

import numpy as np
import torch

from datasets.resize import imresize
from engine.conventions import Conventions
from engine.demo.enlarge import Enlarger
from engine.evaluation import Figures, Restore
from engine.restore import Restored
from utils.colour import blend_classes
from utils.errors import UserError
from utils.images import to_tensor
from utils.metrics import psnr, quantise, ssim


@dataclass(frozen=True)
class Comparison:
    """What the models made of one photograph.

    Attributes:
        pictures: (H, W, 3) uint8 by file name without suffix.
        lr_size, hr_size: (h, w) and (H, W).
        original: figures of the original network; None where there is none.
        pcsr: figures of PCSR.
    """

    pictures: dict[str, np.ndarray]
    lr_size: tuple[int, int]
    hr_size: tuple[int, int]
    original: Figures | None
    pcsr: Figures


def crop_centre(rgb: np.ndarray, conventions: Conventions) -> tuple[np.ndarray, tuple[int, int]]:
    """The centre of an HR image that is `scale` times a whole number of LR pixels, and (h, w).

    Args:
        rgb: (H, W, 3) uint8.

    Raises:
        UserError: nothing is left, or nothing inside the metrics' border.
    """
    scale, border_px = conventions.scale, conventions.border_px
    height, width = rgb.shape[:2]
    # The small number keeps 3 / 0.3 from being 9.
    h, w = int(height / scale + 1e-6), int(width / scale + 1e-6)
    crop_h, crop_w = round(h * scale), round(w * scale)
    if min(h, w) < 1 or min(crop_h, crop_w) <= 2 * border_px:
        raise UserError(
            f"{width}x{height} pixels are too few to compare at x{scale:g}: nothing is left inside "
            f"a border of {border_px} px (--upscale enlarges pictures of any size)"
        )
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    return np.ascontiguousarray(rgb[top : top + crop_h, left : left + crop_w]), (h, w)


@torch.inference_mode()
def compare(
    name: str,
    rgb: np.ndarray,
    enlarger: Enlarger,
    original: Restore | None,
    conventions: Conventions,
    *,
    device: torch.device,
    opacity: float,
) -> Comparison:
    """Restore one photograph with both models.

    Args:
        name: of the photograph, for its figures.
        rgb: HR, (H, W, 3) uint8, cropped here.
        original: of the conventions' scale, or None.
        device: where the models are.
        opacity: of the picture under the class colours.

    Raises:
        UserError: a photograph that is too small.
    """
    hr, lr_size = crop_centre(rgb, conventions)
    hr_size = (hr.shape[0], hr.shape[1])
    lr = imresize(to_tensor(hr), size=lr_size).to(device)
    pictures = {"HR": hr, f"LRx{conventions.scale:g}": quantise(lr)}
    original_figures = None
    if original is not None:
        restored = original(lr, hr_size)
        pictures["Original"] = quantise(restored.sr)
        original_figures = _figures(name, restored, pictures["Original"], hr, conventions)
    restored = enlarger(lr, hr_size)
    assert restored.classes is not None
    pictures["PCSR"] = quantise(restored.sr)
    pcsr_figures = _figures(name, restored, pictures["PCSR"], hr, conventions)
    pictures["PCSR_colored"] = blend_classes(
        pictures["PCSR"], restored.classes.cpu().numpy(), len(restored.shares), opacity
    )
    return Comparison(pictures, lr_size, hr_size, original_figures, pcsr_figures)


def _figures(
    name: str, restored: Restored, sr: np.ndarray, hr: np.ndarray, conventions: Conventions
) -> Figures:
    psnr_type, border_px = conventions.psnr_type, conventions.border_px
    return Figures(
        name=name,
        psnr=psnr(sr, hr, psnr_type=psnr_type, border_px=border_px),
        ssim=ssim(sr, hr, psnr_type=psnr_type, border_px=border_px),
        flops_paper=restored.flops_paper,
        flops_executed=restored.flops_executed,
        shares=restored.shares,
        time_s=restored.time_s,
    )
