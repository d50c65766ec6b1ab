"""Geometric self-ensemble: a network's mean answer over turned and flipped copies of the image.

What a network makes of a flipped image, flipped back, differs a little from what it makes of the
image; the mean has less error than each of them (the "+" of EDSR+, Lim et al. 2017).
"""

from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor

from engine.evaluation import Restore, warm_up
from engine.restore import Restored

Turns = Literal[1, 4, 8]
TURNS: tuple[Turns, ...] = get_args(Turns)
# Axes to flip.
_FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


class SelfEnsemble:
    """Runs an image once for each turn and gives the mean of what comes back.

    Args:
        restore: runs one image.
        turns: 1, the image as it is; 4, its flips; 8, those of its transpose as well.
    """

    def __init__(self, restore: Restore, turns: Turns = 8) -> None:
        self.restore = restore
        self.turns = turns

    def __call__(self, lr: Tensor, size: tuple[int, int]) -> Restored:
        """`lr` (3, h, w) float RGB in [0, 1] to SR of `size` (H, W).

        FLOPs and times are sums over the turns, shares their mean, and classes those of the image
        as it is. Errors are those of `restore`.
        """
        total = self._turned(lr, size, 0)
        mean = total.sr.clone()
        for turn in range(1, self.turns):
            result = self._turned(lr, size, turn)
            mean += result.sr
            total = replace(
                total,
                shares=[a + b for a, b in zip(total.shares, result.shares, strict=True)],
                flops_paper=total.flops_paper + result.flops_paper,
                flops_executed=total.flops_executed + result.flops_executed,
                time_s=total.time_s + result.time_s,
            )
        mean /= self.turns
        return replace(total, sr=mean, shares=[share / self.turns for share in total.shares])

    def warm_up(self, lr: Tensor, size: tuple[int, int]) -> None:
        """Do once what is done only once, as `restore` does it."""
        warm_up(self.restore, lr, size)

    def _turned(self, lr: Tensor, size: tuple[int, int], turn: int) -> Restored:
        height, width = size
        is_transposed = turn >= len(_FLIPS)
        axes = _FLIPS[turn % len(_FLIPS)]
        if is_transposed:
            lr, height, width = lr.transpose(-2, -1), width, height
        result = self.restore(lr.flip(axes).contiguous(), (height, width))
        sr = result.sr.flip(axes)
        return replace(result, sr=sr.transpose(-2, -1) if is_transposed else sr)
