"""Colours of class maps: green where the lightest upsampler works, red where the heaviest does.

Axes: H W image, M upsamplers.
"""

import numpy as np
from numpy.typing import NDArray


def class_colours(count: int) -> NDArray[np.uint8]:
    """(M, 3) RGB from green (easy) over yellow to red (hard); of one class green."""
    position = np.linspace(0.0, 1.0, count)
    ramp = np.stack([2 * position, 2 - 2 * position, np.zeros(count)], axis=1)
    return np.rint(ramp.clip(0, 1) * 255).astype(np.uint8)


def blend_classes(
    rgb: NDArray[np.uint8], classes: NDArray[np.uint8], count: int, opacity: float
) -> NDArray[np.uint8]:
    """Lay each pixel's class colour over a picture.

    Args:
        rgb: (H, W, 3) uint8.
        classes: (H, W) in 0..M-1.
        count: M, the number of upsamplers.
        opacity: of the picture; 1 hides the colours, 0 shows nothing else.

    Returns:
        (H, W, 3) uint8.
    """
    # One row of 256 values per class and channel: a look-up, no float image.
    values = np.arange(256)[None, None] * opacity + class_colours(count)[:, :, None] * (1 - opacity)
    table = np.rint(values).astype(np.uint8)
    return np.stack([table[classes, i, rgb[..., i]] for i in range(3)], axis=-1)
