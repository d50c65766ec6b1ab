"""The conventions a figure depends on: without them a PSNR cannot be compared with another."""

from dataclasses import dataclass
from typing import Any, Literal

from utils.metrics import SSIM_CONVENTION, PsnrType

LrSource = Literal["bicubic float", "bicubic uint8", "given"]


@dataclass(frozen=True)
class Conventions:
    """How images are prepared, run and compared.

    Attributes:
        scale: HR pixels per LR pixel.
        psnr_type: channels of PSNR and SSIM, see `utils.metrics`.
        lr: where LR comes from: made by MATLAB's bicubic (not rounded, or in 8 bits), or files.
        crop: LR cropped to what patches tile, HR to match.
        per_image: whole images; otherwise patches, whose overlaps are averaged.
        patch_size, step: of that crop and of the patches, in LR pixels.
        routing: the routing policy in words; None for original networks.
        refinement: borders between regions smoothed; None for original networks.
        self_ensemble: the mean over flipped and turned copies.
    """

    scale: float
    psnr_type: PsnrType
    lr: LrSource
    crop: bool
    per_image: bool
    patch_size: int = 32
    step: int = 28
    routing: str | None = None
    refinement: bool | None = None
    self_ensemble: bool = False

    @property
    def border_px(self) -> int:
        """HR pixels that the metrics leave out on each side: as many as the scale."""
        return round(self.scale)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the attributes' names, and what is fixed."""
        return {
            "scale": self.scale,
            "psnr_type": self.psnr_type,
            "border_px": self.border_px,
            "lr": self.lr,
            "crop": self.crop,
            "per_image": self.per_image,
            "patch_size": self.patch_size,
            "step": self.step,
            "routing": self.routing,
            "refinement": self.refinement,
            "self_ensemble": self.self_ensemble,
            "quantisation": "prediction clamped and rounded to 8 bits",
            "ssim": SSIM_CONVENTION,
            "mean": "mean of the images' figures",
        }

    def describe(self) -> str:
        """The same on one line, for the table's foot."""
        patches = f"patches of {self.patch_size}, step {self.step}"
        facts = [
            f"{self.psnr_type} 8 bit, border {self.border_px} px",
            f"scale {self.scale:g}",
            f"LR {self.lr}",
            "whole images" if self.per_image else patches,
        ]
        if self.crop and self.per_image:
            facts.append(f"cropped to {patches}")
        elif self.crop:
            facts.append("cropped to these")
        if self.routing is not None:
            facts.append(f"routing {self.routing}")
            facts.append(f"refinement {'on' if self.refinement else 'off'}")
        if self.self_ensemble:
            facts.append("self-ensemble of 8")
        return "; ".join(facts)
