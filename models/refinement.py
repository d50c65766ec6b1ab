"""Pixel-wise refinement: smooths the border between regions of different upsamplers.

Axes: B batch, H W output.
"""

from torch import Tensor
from torch.nn import functional as F


def refine(prediction_B3HW: Tensor, classes_BHW: Tensor) -> Tensor:
    """Average pixels that touch a heavier region.

    A pixel with at least one pixel of a heavier class among its 3x3 neighbours becomes the 3x3
    mean of `prediction_B3HW`. The outermost rows and columns stay as they are, so no padding is
    needed and an image under 3 pixels high or wide comes back unchanged.

    Args:
        prediction_B3HW: (B, 3, H, W) float, any range.
        classes_BHW: (B, H, W) integer, 0 the lightest upsampler; at most 256 classes.

    Returns:
        (B, 3, H, W), same dtype; `prediction_B3HW` is left unchanged.
    """
    refined = prediction_B3HW.clone()
    if min(prediction_B3HW.shape[-2:]) < 3:
        return refined
    classes = classes_BHW[:, None].to(prediction_B3HW.dtype)
    below_heavier = F.max_pool2d(classes, 3, stride=1) > classes[..., 1:-1, 1:-1]
    inner = refined[..., 1:-1, 1:-1]
    inner.copy_(F.avg_pool2d(prediction_B3HW, 3, stride=1).where(below_heavier, inner))
    return refined
