"""One image from LR to SR, with what it cost: what the test scripts and the demo share.

Axes: h w LR, H W output, M upsamplers.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.budget import BudgetPlan
from engine.engines import EngineName, make_engine
from engine.finite import check_finite, is_finite
from models import inference
from models.backbones.base import SRNetwork
from models.cost import ImageCost
from models.grid import PixelGrid
from models.inference import SRResult, super_resolve
from models.large import LargeOriginal
from models.patches import (
    PATCH_BATCH_SIZE,
    PatchCanvas,
    patch_corners,
    super_resolve_patches,
)
from models.pcsr import PCSR
from models.reference import PIXEL_BATCH_SIZE
from models.routing import KRouting, Routing
from utils.errors import UserError
from utils.flops import PcsrCost, executed_flops, paper_flops
from utils.machine import Timer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patches:
    """Patch-wise inference: overlapping patches, overlaps averaged.

    Attributes:
        size, step: in LR pixels.
        batch_size: patches that go through the network at once.
    """

    size: int = 32
    step: int = 28
    batch_size: int = PATCH_BATCH_SIZE


@dataclass(frozen=True)
class Restored:
    """A super-resolved image and its cost.

    Attributes:
        sr: (3, H, W) float32 RGB on the device, not clamped.
        classes: (H, W) uint8, each pixel's upsampler, 0 the lightest; None for original networks.
        shares: share of the computed pixels per upsampler, light to heavy; empty for originals.
        flops_paper, flops_executed: see `utils.flops`.
        time_s: synchronised wall-clock time of the network, from LR on the device to SR.
    """

    sr: Tensor
    classes: Tensor | None
    shares: list[float]
    flops_paper: int
    flops_executed: int
    time_s: float


class OriginalRestorer:
    """Runs an original network.

    Args:
        model: built with `no_upsampling: false`, in eval mode, on its device.
        patches: work patch by patch; None for whole images.
        checked: refuse outputs that hold NaN or infinity.
    """

    def __init__(
        self, model: SRNetwork, patches: Patches | None = None, *, checked: bool = True
    ) -> None:
        self.model = model
        self.patches = patches
        self.checked = checked
        self._whole = LargeOriginal(model)

    @property
    def scale(self) -> int:
        """The network's scale."""
        return self.model.scale

    @torch.inference_mode()
    def __call__(self, lr: Tensor, size: tuple[int, int] | None = None) -> Restored:
        """`lr` (3, h, w) float RGB in [0, 1] on the model's device; SR is (3, scale h, scale w).

        Args:
            size: (H, W) of SR, from callers that say it of any network; there is one only.

        Raises:
            UserError: another size; or an output that holds NaN or infinity, where that is checked.
        """
        h, w = lr.shape[-2:]
        if size is not None and size != (self.scale * h, self.scale * w):
            raise UserError(
                f"LR of {w}x{h} by a network of x{self.scale} does not become {size[1]}x{size[0]}"
            )
        if self.patches is None:
            self._whole.prepare((h, w))  # not on the clock
        with Timer(lr.device) as timer:
            if self.patches is None:
                sr = self._whole(lr[None])
            else:
                sr = self._patched(lr[None], self.patches)
        if self.checked:
            check_finite(sr)
        return Restored(sr[0], None, [], *self._flops((h, w)), timer.elapsed_s)

    def _patched(self, lr: Tensor, patches: Patches) -> Tensor:
        s = self.scale
        h, w = lr.shape[-2:]
        corners, (ph, pw) = patch_corners((h, w), patches.size, patches.step)
        inputs = torch.cat([lr[..., y : y + ph, x : x + pw] for y, x in corners])
        canvas = PatchCanvas((h * s, w * s), lr)
        outputs = torch.cat([self.model(part) for part in inputs.split(patches.batch_size)])
        for (y, x), output in zip(corners, outputs, strict=True):
            canvas.add((y * s, x * s), output)
        return canvas.mean()

    def _flops(self, lr_size: tuple[int, int]) -> tuple[int, int]:
        """FLOPs in the paper convention and executed ones of an image of (h, w)."""
        if self.patches is None:
            paper = paper_flops(self.model, (1, 3, *lr_size))
            return paper, self._whole.flops(lr_size)
        corners, patch_size = patch_corners(lr_size, self.patches.size, self.patches.step)
        paper, executed = (
            f(self.model, (1, 3, *patch_size)) * len(corners) for f in (paper_flops, executed_flops)
        )
        return paper, executed


class PcsrRestorer:
    """Runs a PCSR model of any phase.

    Args:
        model: in eval mode, on its device.
        routing: which upsampler each pixel gets, or what makes the routing of each image.
        refinement: smooth the borders between regions of different upsamplers.
        pixel_batch_size: at most this many pixels go through an MLP at once.
        patches: work patch by patch; None for whole images.
        engine: "fast", or "reference" for the straightforward one.
        precision: "fp32", "bf16", "fp16" or "auto" (see `utils.device`); the reference engine
            works in fp32.
        compiled: the encoder by torch.compile.
        checked: an output that holds NaN or infinity is computed again in fp32, with a warning,
            and refused if it is no better.
    """

    def __init__(
        self,
        model: PCSR,
        routing: Routing | BudgetPlan | None = None,
        *,
        refinement: bool = True,
        pixel_batch_size: int = PIXEL_BATCH_SIZE,
        patches: Patches | None = None,
        engine: EngineName = "fast",
        precision: str = "fp32",
        compiled: bool = False,
        checked: bool = True,
    ) -> None:
        self.model = model
        self.routing = routing or KRouting(0.0)
        self.refinement = refinement
        self.patches = patches
        self.engine = make_engine(model, engine, pixel_batch_size, precision, compiled=compiled)
        self.cost = PcsrCost.of(model)
        self._checked = checked
        self._pixel_batch_size = pixel_batch_size
        self._exact: PcsrRestorer | None = None
        self._to_compile = compiled
        self._compiled: set[tuple[int, ...]] = set()

    def _compile(self, lr: Tensor) -> None:
        """Compile for an image's size, where that has not been done: not on the clock."""
        if self._to_compile and lr.shape not in self._compiled:
            self._compiled.add(tuple(lr.shape))
            for _ in self.engine.encode_rows(lr[None]):
                pass

    @torch.inference_mode()
    def __call__(self, lr: Tensor, size: tuple[int, int]) -> Restored:
        """`lr` (3, h, w) float RGB in [0, 1] on the model's device to SR of `size` (H, W).

        Raises:
            UserError: an output that holds NaN or infinity, where that is checked.
        """
        # Counts the model once: not on the clock.
        self.cost.log_costs((lr.shape[-2], lr.shape[-1]), size)
        self._compile(lr)
        routing = self.routing
        if isinstance(routing, BudgetPlan):
            routing = routing.routing_for(self, lr, size)
        with Timer(lr.device) as timer:
            result = self.run(lr, size, routing)
        if self._checked and not is_finite(result.sr):
            if self.engine.dtype != torch.float32:
                _log.warning("the image overflows in half precision: it is computed again in fp32")
                with Timer(lr.device) as timer:
                    result = self._in_fp32().run(lr, size, routing)
            check_finite(result.sr)
        patches, *encoded = result.encoded_size
        encoded_size = (encoded[0], encoded[1])
        counts = result.pixel_counts
        return Restored(
            sr=result.sr[0],
            classes=result.classes[0],
            shares=[n / sum(counts) for n in counts],
            flops_paper=self.cost.paper_total(encoded_size, counts, patches=patches),
            flops_executed=patches
            * result.encoder_passes
            * self.cost.encoder_executed(encoded_size)
            + result.mlp_flops,
            time_s=timer.elapsed_s,
        )

    @torch.inference_mode()
    def run(self, lr: Tensor, size: tuple[int, int], routing: Routing) -> SRResult:
        """The inference alone, with a routing of one's own."""
        lr_size = (lr.shape[-2], lr.shape[-1])
        log_costs = self.cost.log_costs(lr_size, size)
        refinement = self.refinement
        if self.works_whole(lr_size):
            return super_resolve(
                self.engine, lr[None], size, routing, log_costs, refinement=refinement
            )
        assert self.patches is not None
        return super_resolve_patches(
            self.engine,
            lr[None],
            _common_scale(lr_size, size),
            routing,
            log_costs,
            patch_size=self.patches.size,
            step=self.patches.step,
            patch_batch_size=self.patches.batch_size,
            refinement=refinement,
        )

    def _in_fp32(self) -> "PcsrRestorer":
        """The same in fp32, for images that overflow in half precision."""
        if self._exact is None:
            self._exact = PcsrRestorer(
                self.model,
                refinement=self.refinement,
                pixel_batch_size=self._pixel_batch_size,
                patches=self.patches,
            )
        return self._exact

    def warm_up(self, lr: Tensor, size: tuple[int, int]) -> None:
        """Do once what is done only once, whatever budget there is for real images."""
        self.run(lr, size, KRouting(0.0) if isinstance(self.routing, BudgetPlan) else self.routing)

    def image_cost(
        self, lr_size: tuple[int, int], size: tuple[int, int], *, is_global: bool = True
    ) -> ImageCost:
        """Executed FLOPs from an image of (h, w) to (H, W), as a function of its classes.

        Args:
            is_global: the routing is.
        """
        passes = self.encoder_passes(lr_size) if is_global else 1
        patches, run_rows = 1, self.engine.run_rows(lr_size)
        if not self.works_whole(lr_size):
            assert self.patches is not None
            scale = _common_scale(lr_size, size)
            corners, lr_size = patch_corners(lr_size, self.patches.size, self.patches.step)
            size = (round(lr_size[0] * scale), round(lr_size[1] * scale))
            patches, run_rows = len(corners), [lr_size[0]]
        cost = self.engine.cost(PixelGrid.build(lr_size, size), run_rows)
        encoder = passes * self.cost.encoder_executed(lr_size)
        return ImageCost(replace(cost, fixed=cost.fixed + encoder), patches, lr_size, size)

    def encoder_passes(self, lr_size: tuple[int, int]) -> int:
        """How often the encoder runs on an image of (h, w) whose pixels are routed together."""
        values = self.model.encoder.out_dim * lr_size[0] * lr_size[1]
        is_kept = values <= inference.KEPT_FEATURES
        return 1 if is_kept or not self.works_whole(lr_size) else 2

    def tiled_rows(self, rows: int) -> int:
        """The least number of LR rows, at least `rows`, that can be run on their own."""
        if self.patches is None or rows <= self.patches.size:
            return rows if self.patches is None else self.patches.size
        size, step = self.patches.size, self.patches.step
        return size + -(-(rows - size) // step) * step

    def works_whole(self, lr_size: tuple[int, int]) -> bool:
        """Whether an image of (h, w) is run whole, not in patches."""
        return self.patches is None or max(lr_size) <= self.patches.size


def _common_scale(lr_size: tuple[int, int], size: tuple[int, int]) -> float:
    """The scale where it is the same on both axes; UserError otherwise."""
    scale_y, scale_x = size[0] / lr_size[0], size[1] / lr_size[1]
    if abs(scale_y - scale_x) > 1e-6:
        raise UserError(
            f"patch mode needs one scale for both axes, not {scale_y:g} and {scale_x:g}: "
            f"use --per_image"
        )
    return scale_y
