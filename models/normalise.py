"""Data normalisation inside the model: callers pass and get images in [0, 1].

Axes: B batch, 3 RGB, h w LR.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.registry import nearest
from utils.typed import conform

# Mean of DIV2K, which CARN and RCAN were published with.
DIV2K_MEAN = (0.4488, 0.4371, 0.4040)


class DataNorm(nn.Module):
    """``(x - mean) / std`` on RGB in [0, 1]; mean and std are buffers, so checkpoints hold them.

    Args:
        data_norm: ``{mean: [r, g, b], std: [r, g, b]}`` of a config, or None.
        default_mean: mean to use where `data_norm` is None (std is then 1).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, data_norm: Mapping[str, Any] | None, default_mean: Sequence[float] = (0.0, 0.0, 0.0)
    ) -> None:
        super().__init__()
        values = {"mean": list(default_mean), "std": [1.0, 1.0, 1.0], **(data_norm or {})}
        for name, value in values.items():
            if name not in ("mean", "std"):
                raise UserError(
                    f"config: unknown key `data_norm.{name}`{nearest(name, ('mean', 'std'))}"
                )
            numbers = conform(value, list[float], f"data_norm.{name}")
            if len(numbers) != 3:
                raise UserError(f"config: `data_norm.{name}` takes three numbers, R, G and B")
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).view(1, 3, 1, 1))
            if not bool(getattr(self, name).isfinite().all()):
                raise UserError(f"config: `data_norm.{name}` is more than float32 can hold")
        if not bool((self.std > 0).all()):
            raise UserError("config: `data_norm.std` must be positive")

    def normalise(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] to the network's range."""
        return (image - self.mean) / self.std

    def denormalise(self, image: Tensor) -> Tensor:
        """(B, 3, h, w) from the network's range to [0, 1], not clamped."""
        return image * self.std + self.mean
