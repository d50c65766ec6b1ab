"""Evaluation: figures per image, and their mean.

Axes: h w LR, H W output, M upsamplers.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from datasets.resize import imresize
from engine.memory import memory_named
from engine.restore import Restored
from engine.samples import EvaluationSet
from utils.errors import UserError
from utils.machine import Timer
from utils.metrics import json_number, psnr, ssim
from utils.psnr_conventions import Psnrs, mean_psnrs, psnrs

# (3, h, w) LR on the device and (H, W) to the restored image.
Restore = Callable[[Tensor, tuple[int, int]], Restored]


@dataclass(frozen=True)
class Figures:
    """What is measured on one image, or the mean over images.

    Attributes:
        name: the HR image's file name.
        psnr: in dB; inf for equal images.
        ssim: at most 1; nan where the image is smaller than its window.
        flops_paper, flops_executed: see `utils.flops`.
        shares: share of the computed pixels per upsampler, light to heavy; empty for originals.
        time_s: synchronised wall-clock time from LR on the device to SR.
        psnrs: PSNR by other conventions, where it was asked for.
    """

    name: str
    psnr: float
    ssim: float
    flops_paper: float
    flops_executed: float
    shares: list[float]
    time_s: float
    psnrs: Psnrs | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; null for a PSNR or SSIM that JSON cannot hold."""
        content = {
            **dataclasses.asdict(self),
            "psnr": json_number(self.psnr),
            "ssim": json_number(self.ssim),
        }
        del content["psnrs"]
        if self.psnrs is not None:
            content["psnr_by_convention"] = {
                name: {str(border): json_number(value) for border, value in row.items()}
                for name, row in self.psnrs.items()
            }
        return content


class Evaluation:
    """Runs images and compares them with HR, one at a time.

    The figures of an image do not depend on the others (but for its time: the first call warms
    up), so images can be shared out over processes.

    Args:
        images: what is run.
        restore: runs it.
        device: where LR is wanted.
        all_psnr: PSNR by other conventions, too.
    """

    def __init__(
        self,
        images: EvaluationSet,
        restore: Restore,
        device: torch.device,
        *,
        all_psnr: bool = False,
    ) -> None:
        self.images = images
        self.restore = restore
        self.device = device
        self.all_psnr = all_psnr
        self._is_warm = False

    def __call__(self, index: int) -> Figures:
        """The figures of one image.

        Raises:
            UserError: an image that cannot be read or run; its name is in the message.
        """
        sample, conventions = self.images[index], self.images.conventions
        lr = sample.lr.to(self.device)
        with errors_named(sample.name, self.device):
            if not self._is_warm:
                # A corner, so that the first image's time does not hold it.
                corner = lr[:, : conventions.patch_size, : conventions.patch_size].contiguous()
                height, width = (round(n * conventions.scale) for n in corner.shape[-2:])
                warm_up(self.restore, corner, (height, width))
                self._is_warm = True
            restored = self.restore(lr, sample.size)
        compared: dict[str, Any] = {
            "psnr_type": conventions.psnr_type,
            "border_px": conventions.border_px,
        }
        return Figures(
            name=sample.name,
            psnr=psnr(restored.sr, sample.hr, **compared),
            ssim=ssim(restored.sr, sample.hr, **compared),
            flops_paper=restored.flops_paper,
            flops_executed=restored.flops_executed,
            shares=restored.shares,
            time_s=restored.time_s,
            psnrs=psnrs(restored.sr, sample.hr, conventions.border_px) if self.all_psnr else None,
        )


@contextlib.contextmanager
def errors_named(name: str, device: torch.device) -> Iterator[None]:
    """Errors that users can do something about become a UserError with the image's name."""
    too_large = (
        f"not enough memory on {device}; patches (without --per_image) and a smaller "
        f"--patch_batch_size take less"
    )
    try:
        with memory_named(too_large):
            yield
    except UserError as error:
        raise UserError(f"image {name}: {error}") from error


def bicubic(lr: Tensor, size: tuple[int, int]) -> Restored:
    """The baseline: MATLAB's bicubic enlargement. Its FLOPs are not counted."""
    with Timer(lr.device) as timer:
        sr = imresize(lr, size=size)
    return Restored(sr, None, [], 0, 0, timer.elapsed_s)


def mean_of(figures: Sequence[Figures]) -> Figures:
    """The mean of every figure over the images (at least one)."""

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(figures)

    by_convention = [f.psnrs for f in figures if f.psnrs is not None]

    return Figures(
        name="mean",
        psnr=mean(f.psnr for f in figures),
        ssim=mean(f.ssim for f in figures),
        flops_paper=mean(f.flops_paper for f in figures),
        flops_executed=mean(f.flops_executed for f in figures),
        shares=[mean(column) for column in zip(*(f.shares for f in figures), strict=True)],
        time_s=mean(f.time_s for f in figures),
        psnrs=mean_psnrs(by_convention) if by_convention else None,
    )


def warm_up(restore: Restore, lr: Tensor, size: tuple[int, int]) -> None:
    """Do once what is done only once: by its own `warm_up` where there is one, or by a run.

    (A budget for images would not suit a corner of one.)
    """
    getattr(restore, "warm_up", restore)(lr, size)
