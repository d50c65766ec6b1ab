"""A picture of one's own, of whatever kind, enlarged: no HR, no original network.

Axes: h w LR, H W output.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datasets.resize import imresize
from engine.demo.enlarge import Enlarger
from engine.restore import Restored
from utils.colour import blend_classes
from utils.errors import UserError
from utils.image_decoding import MAX_PIXELS
from utils.images import Picture, to_array, to_tensor
from utils.transparency import fill_transparent


@dataclass(frozen=True)
class Upscaled:
    """An enlarged picture.

    Attributes:
        picture: bit depth, alpha and colour profile as in the input.
        class_map: (H, W, 3) uint8, the class colours over the picture; None where not asked for.
        restored: what the network did.
    """

    picture: Picture
    class_map: np.ndarray | None
    restored: Restored


def output_size(
    lr_size: tuple[int, int], scale: float | None, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """`size` (H, W) where given, else each side times `scale`, rounded, at least 1.

    Raises:
        UserError: more pixels than any picture may have.
    """
    if size is None:
        assert scale is not None
        size = (max(1, round(lr_size[0] * scale)), max(1, round(lr_size[1] * scale)))
    if size[0] * size[1] > MAX_PIXELS:
        raise UserError(
            f"the result would have {size[1]}x{size[0]} pixels, more than {MAX_PIXELS} in all: "
            f"choose a smaller --scale or --size"
        )
    return size


@torch.inference_mode()
def upscale(
    picture: Picture,
    size: tuple[int, int],
    enlarger: Enlarger,
    *,
    device: torch.device,
    opacity: float | None,
) -> Upscaled:
    """Enlarge `picture` to `size` (H, W).

    Alpha is enlarged apart, by bicubic; under transparent pixels the visible colours are continued,
    so that edges get no fringe. A gray picture stays gray.

    Args:
        opacity: of the picture under the class colours; None for no class map.
    """
    lr = to_tensor(picture.rgb)
    alpha_HW = None
    if picture.alpha is not None:
        alpha_hw = _to_plane(picture.alpha)
        lr = fill_transparent(lr, alpha_hw)
        alpha_HW = imresize(alpha_hw[None], size=size)[0]
    restored = enlarger(lr.to(device), size)
    sr = restored.sr.cpu()
    if _is_gray(picture.rgb):
        sr = sr.mean(dim=0, keepdim=True).expand(3, -1, -1)
    assert restored.classes is not None
    depth = picture.bit_depth
    enlarged = Picture(
        rgb=to_array(sr, depth),
        alpha=None if alpha_HW is None else _from_plane(alpha_HW, depth),
        icc_profile=picture.icc_profile,
    )
    class_map = None
    if opacity is not None:
        classes = restored.classes.cpu().numpy()
        class_map = blend_classes(to_array(sr), classes, len(restored.shares), opacity)
    return Upscaled(enlarged, class_map, restored)


def _is_gray(rgb: np.ndarray) -> bool:
    return bool((rgb[..., :1] == rgb[..., 1:]).all())


def _to_plane(alpha: np.ndarray) -> Tensor:
    """(H, W) uint8 or uint16 to float32 in [0, 1]."""
    return to_tensor(alpha[:, :, None])[0]


def _from_plane(alpha_HW: Tensor, bit_depth: int) -> np.ndarray:
    """(H, W) float to uint8 or uint16, clamped and rounded."""
    return np.ascontiguousarray(to_array(alpha_HW[None], bit_depth)[..., 0])
