"""Outputs that are no numbers are said, not shown as black pictures."""

from torch import Tensor

from utils.errors import UserError


def is_finite(image: Tensor) -> bool:
    """Whether an image holds neither NaN nor infinity; without a temporary of its size."""
    lowest, highest = image.aminmax()  # NaN where there is one
    return bool((lowest.isfinite() & highest.isfinite()).item())


def check_finite(image: Tensor) -> None:
    """Refuse an image that holds NaN or infinity.

    Raises:
        UserError: it does.
    """
    if not is_finite(image):
        raise UserError(
            "the output holds NaN or infinity: the weights are damaged or of another kind of input"
        )
