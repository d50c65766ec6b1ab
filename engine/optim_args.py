"""Checks of what configs give to optimisers."""

from collections.abc import Sequence

from utils.errors import UserError


def check_rate(lr: float) -> None:
    """Refuse a learning rate that is not positive."""
    if not lr > 0:
        raise UserError(f"config: `optimizer.args.lr` must be positive, not {lr}")


def two_betas(betas: Sequence[float]) -> tuple[float, float]:
    """`betas`, which must be two."""
    if len(betas) != 2:
        raise UserError(f"config: `optimizer.args.betas` takes two numbers, not {list(betas)}")
    return betas[0], betas[1]
