"""Outputs that are no numbers are said, not shown as black pictures."""

import torch
from torch import Tensor

from utils.errors import UserError


def is_finite(image: Tensor) -> bool:
    """Whether an image holds neither NaN nor infinity; without a temporary of its size."""
    return bool(image.sum().isfinite())


def check_finite(image: Tensor) -> None:
    """Refuse an image that holds NaN or infinity.

    Raises:
        UserError: it does.
    """
    if not is_finite(image):
        kind = "fp32" if image.dtype == torch.float32 else str(image.dtype).removeprefix("torch.")
        raise UserError(
            f"the output holds NaN or infinity in {kind}: the weights are damaged or of another "
            f"kind of input"
        )
