"""Original networks on large images: in memory that holds the LR features and a strip of the tail.

Axes: B batch, C channels, h w LR, H W output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.backbones.base import SRNetwork
from models.strips import lr_strips
from utils.flops import executed_flops

# LR pixels whose output is made at once; an image of no more is run as it is. At x4 a tail of 64
# channels takes about 1 GB for them.
WHOLE_PX = 2**17
# No output pixel depends on LR features farther away than this.
_TAIL_RADIUS_PX = 4


def in_strips(network: SRNetwork, lr: Tensor, whole_px: int = WHOLE_PX) -> Tensor:
    """``network(lr)``, up to rounding.

    Features are computed as a stream of rows, each once (RCAN's, whose attention looks at the whole
    image, all at once), the tail in strips that overlap by a few rows.

    Args:
        network: an original one, in eval mode.
        lr: (B, 3, h, w) float RGB in [0, 1] on its device.
        whole_px: LR pixels that are worked on at once.

    Returns:
        (B, 3, scale h, scale w), not clamped.
    """
    h, w = lr.shape[-2:]
    if h * w <= whole_px:
        return network(lr)
    scale = network.scale
    x = network.norm.normalise(lr)
    feat = torch.cat(list(_feature_rows(network, x, whole_px)), dim=2)
    sr = lr.new_empty(len(lr), 3, scale * h, scale * w)
    for rows, used in _tail_strips(h, w, whole_px):
        out = network.reconstruct(feat[:, :, used], x[:, :, used])
        own = slice(scale * (rows.start - used.start), scale * (rows.stop - used.start))
        sr[:, :, scale * rows.start : scale * rows.stop] = network.norm.denormalise(out[:, :, own])
    return sr


def flops_in_strips(network: SRNetwork, lr_size: tuple[int, int], whole_px: int = WHOLE_PX) -> int:
    """FLOPs that :func:`in_strips` executes for one image of (h, w), see `utils.flops`."""
    h, w = lr_size
    whole = executed_flops(network, (1, 3, h, w))
    if h * w <= whole_px:
        return whole
    tail = _Tail(network)

    def of_tail(rows: int) -> int:
        return executed_flops(tail, (1, network.out_dim, rows, w), (1, 3, rows, w))

    strips = [used.stop - used.start for _, used in _tail_strips(h, w, whole_px)]
    return whole - of_tail(h) + sum(strips.count(rows) * of_tail(rows) for rows in set(strips))


class _Tail(nn.Module):
    """What follows the features, from features and normalised LR."""

    def __init__(self, network: SRNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, feat_BChw: Tensor, x_B3hw: Tensor) -> Tensor:
        return self.network.reconstruct(feat_BChw, x_B3hw)


def _feature_rows(network: SRNetwork, x: Tensor, whole_px: int) -> Iterator[Tensor]:
    """The features (B, C, r, w) of normalised LR, run by run."""
    stream = network.fused(network.input_dtype).stream()
    if stream is None:
        yield network.features(x)
        return
    h, w = x.shape[-2:]
    for rows in lr_strips(h, w, whole_px):
        part = x[:, :, rows].permute(0, 2, 3, 1).contiguous()
        out = stream.push(part, last=rows.stop == h)
        if out.shape[1]:
            yield out.permute(0, 3, 1, 2)


def _tail_strips(h: int, w: int, whole_px: int) -> Iterator[tuple[slice, slice]]:
    """Strips of LR rows, and of those that their output depends on."""
    for rows in lr_strips(h, w, whole_px):
        yield rows, slice(max(0, rows.start - _TAIL_RADIUS_PX), min(h, rows.stop + _TAIL_RADIUS_PX))
