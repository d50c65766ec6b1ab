"""What every backbone shares: the call contract, the two uses, and the PixelShuffle tail.

Axes: B batch, C channels, h w LR, H W output.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.fuse import fused_copy
from models.normalise import DataNorm
from models.row_graph import RowGraph
from models.streams import Encoder, RowStream
from utils.errors import UserError

SCALES = (2, 3, 4)


class SRNetwork(nn.Module):
    """A super-resolution network that can serve as a backbone.

    With ``no_upsampling=False`` it is the original network: ``forward`` takes `lr` (B, 3, h, w)
    float RGB in [0, 1] and returns (B, 3, scale h, scale w), not clamped.
    With ``no_upsampling=True`` it is an encoder: ``forward`` takes a *normalised* image
    (B, 3, h, w) and returns features (B, out_dim, h, w). Any h, w >= 1.

    Subclasses set `out_dim` and `receptive_radius_px`, build their tail only where
    `no_upsampling` is false, and write :meth:`features` and :meth:`reconstruct`.

    Attributes:
        out_dim: channels of the features.
        receptive_radius_px: how many LR pixels beyond its own position a feature depends on, so
            that tiles with this halo give exactly the whole image's features.
        tail_radius_px: on how many LR pixels of features beyond its own an output pixel depends, or
            more.
    """

    out_dim: int
    receptive_radius_px: int
    tail_radius_px: int = 4
    default_mean: Sequence[float] = (0.0, 0.0, 0.0)

    def __init__(
        self, *, scale: int, no_upsampling: bool, data_norm: Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        if not no_upsampling and scale not in SCALES:
            raise UserError(f"scale {scale}: original networks exist for scales {SCALES}")
        self.scale = scale
        self.no_upsampling = no_upsampling
        if not no_upsampling:
            self.norm = DataNorm(data_norm, self.default_mean)

    @property
    def input_dtype(self) -> torch.dtype:
        """What :meth:`features` takes."""
        return next(self.parameters()).dtype

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, h, w) normalised to features (B, out_dim, h, w)."""
        raise NotImplementedError

    def reconstruct(self, feat: Tensor, x: Tensor) -> Tensor:
        """Features and normalised LR to the normalised output (B, 3, scale h, scale w)."""
        raise NotImplementedError

    def fused(self, dtype: torch.dtype = torch.float32) -> Encoder:
        """The features for inference, equal up to rounding and faster, on a copy of the weights.

        Of an original network, too, this is the part before the tail. A backbone whose memory
        traffic can be cut further returns a module of its own.

        Args:
            dtype: of weights and activations; callers convert what they pass.
        """
        features = fused_copy(self).to(dtype)
        features.no_upsampling = True
        return features

    def stream(self) -> RowStream | None:
        """A new stream from normalised rows (B, r, w, 3) to feature rows.

        Of a network without batch norm, or of :meth:`fused`'s. None where there is none: where
        features depend on the whole image at once.
        """
        return None

    def graph(self) -> RowGraph | None:
        """The features as sums of convolutions, batch norm folded; None where they are not that.

        Weights are read, not copied.
        """
        return None

    def forward(self, lr: Tensor) -> Tensor:
        if self.no_upsampling:
            return self.features(lr)
        x = self.norm.normalise(lr)
        return self.norm.denormalise(self.reconstruct(self.features(x), x))


def check_sizes(**sizes: int) -> None:
    """Refuse numbers of channels or blocks below 1.

    Raises:
        UserError: naming the argument.
    """
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"config: a backbone's `{name}` must be 1 or more, not {size}")


def conv3x3(in_dim: int, out_dim: int, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size."""
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, groups=groups)


def shuffle_steps(scale: int) -> list[int]:
    """PixelShuffle factors of an upsampling tail: one doubling per factor 2, or one tripling."""
    return {2: [2], 3: [3], 4: [2, 2]}[scale]
