"""Original networks on large images: in memory that holds the LR features and a strip of the tail.

Axes: B batch, C channels, h w LR, H W output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.backbones.base import SRNetwork
from models.streams import Encoder
from models.strips import lr_strips
from utils.flops import executed_flops

# LR pixels whose output is made at once; an image of no more is run as it is. At x4 a tail of 64
# channels takes about 1 GB for them.
WHOLE_PX = 2**17


class LargeOriginal:
    """What an original network makes of images of any size, up to rounding.

    Features are computed as a stream of rows, each once (RCAN's, whose attention looks at the whole
    image, all at once), what follows them in strips that overlap by a few rows.

    Args:
        network: in eval mode, on its device. Its weights are those of the first large image.
        whole_px: LR pixels that are worked on at once.
    """

    def __init__(self, network: SRNetwork, whole_px: int = WHOLE_PX) -> None:
        self.network = network
        self.whole_px = whole_px
        self._encoder: Encoder | None = None
        self._flops: dict[tuple[int, int], int] = {}

    @torch.inference_mode()
    def prepare(self, lr_size: tuple[int, int]) -> None:
        """Do what is done once, before an image of (h, w)."""
        if self._encoder is not None or self._is_small(lr_size):
            return
        # RCAN has neither, and a copy of it takes half a second.
        if self.network.graph() is not None or self.network.stream() is not None:
            self._encoder = self.network.fused(self.network.input_dtype)

    def __call__(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) float RGB in [0, 1] to (B, 3, scale h, scale w), not clamped."""
        h, w = lr.shape[-2:]
        if self._is_small((h, w)):
            return self.network(lr)
        self.prepare((h, w))
        scale, norm = self.network.scale, self.network.norm
        x = norm.normalise(lr)
        feat = self._features(x)
        sr = lr.new_empty(len(lr), 3, scale * h, scale * w)
        for rows, used in self._tail_strips(h, w):
            out = self.network.reconstruct(feat[:, :, used], x[:, :, used])
            own = slice(scale * (rows.start - used.start), scale * (rows.stop - used.start))
            sr[:, :, scale * rows.start : scale * rows.stop] = norm.denormalise(out[:, :, own])
        return sr

    def flops(self, lr_size: tuple[int, int]) -> int:
        """Executed FLOPs of the network on one image of (h, w), overlaps included (`utils.flops`).

        As of PCSR's backbones, those of the layers as they are: fused ones may take fewer.
        """
        if lr_size not in self._flops:
            h, w = lr_size
            flops = executed_flops(self.network, (1, 3, h, w))
            if not self._is_small(lr_size):
                row = executed_flops(
                    _Tail(self.network), (1, self.network.out_dim, 1, w), (1, 3, 1, w)
                )
                used_rows = sum(used.stop - used.start for _, used in self._tail_strips(h, w))
                flops += (used_rows - h) * row
            self._flops[lr_size] = flops
        return self._flops[lr_size]

    def _is_small(self, lr_size: tuple[int, int]) -> bool:
        return lr_size[0] * lr_size[1] <= self.whole_px

    def _features(self, x: Tensor) -> Tensor:
        """The features (B, C, h, w) of normalised LR."""
        stream = None if self._encoder is None else self._encoder.stream()
        if stream is None:
            return self.network.features(x)
        h, w = x.shape[-2:]
        # Into one tensor: the runs beside their concatenation would take twice the memory.
        feat_BhwC = x.new_empty(len(x), h, w, self.network.out_dim)
        done = 0
        for rows in lr_strips(h, w, self.whole_px):
            part = x[:, :, rows].permute(0, 2, 3, 1).contiguous()
            out = stream.push(part, last=rows.stop == h)
            count = out.shape[1]
            if count:
                feat_BhwC[:, done : done + count] = out
            done += count
        return feat_BhwC.permute(0, 3, 1, 2)

    def _tail_strips(self, h: int, w: int) -> Iterator[tuple[slice, slice]]:
        """Strips of LR rows, and of those that their output depends on."""
        for rows in lr_strips(h, w, self.whole_px):
            radius = self.network.tail_radius_px
            yield rows, slice(max(0, rows.start - radius), min(h, rows.stop + radius))


class _Tail(nn.Module):
    """What follows the features, from features and normalised LR."""

    def __init__(self, network: SRNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, feat_BChw: Tensor, x_B3hw: Tensor) -> Tensor:
        return self.network.reconstruct(feat_BChw, x_B3hw)
