"""A PCSR model as one graph that other runtimes can run, routing included.

Shapes stay open: everything is written in operations that ONNX has, without tables of a size. What
`models.reference` and `models.fast` compute is computed here for whole images.

Axes: B batch, C channels, D hidden width, h w LR, L LR pixels of all images, H W output, P output
pixels per LR pixel, N = L P, M upsamplers, R output pixels that an upsampler gets.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.grid import PixelGrid
from models.pcsr import PCSR
from models.routing import MAX_K
from models.sampler import LIIFSampler


class RoutedGraph(nn.Module):
    """A model with classifier at one integer scale, every pixel through its class's upsampler.

    ``forward(lr, k)`` takes `lr` (B, 3, h, w) float RGB in [0, 1], any h, w >= 1, and `k` (1,), the
    trade-off of `models.routing.KRouting`. It returns SR (B, 3, H, W), not clamped, and the
    classes (B, H, W) uint8, 0 the lightest upsampler.

    Args:
        model: a PCSR model with two or more upsamplers, in eval mode.
        scale: output pixels per LR pixel, on each axis.
        log_costs: (M,) logarithms of the relative costs at that scale, see `utils.flops`.
        refinement: smooth the borders between regions of different upsamplers.
    """

    def __init__(
        self, model: PCSR, scale: int, log_costs: Sequence[float], *, refinement: bool = True
    ) -> None:
        super().__init__()
        assert model.classifier is not None
        self.model = model
        self.scale = scale
        self.refinement = refinement
        self.classifier = PhasedSampler(model.classifier, scale)
        self.upsamplers = nn.ModuleList(PhasedSampler(each, scale) for each in model.upsamplers)
        self.log_costs = tuple(log_costs)

    def forward(self, lr: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, h, w) in [0, 1] and (1,) to (B, 3, H, W), not clamped, and (B, H, W) uint8."""
        feat = self.model.encode(lr)
        classes_N = self._classes(self.classifier.everywhere(feat), k)
        # Pixels are found by LR pixel and position in it: to divide a number by P, runtimes may go
        # through float32, which not all of them fit into.
        classes_LP = classes_N.view(-1, self.scale**2)
        residual_LP3 = feat.new_zeros(1, 1, 1).expand(*classes_LP.shape, 3)
        for index, upsampler in enumerate(self.upsamplers):
            lr_pixels_R, positions_R = torch.nonzero(classes_LP == index).unbind(1)
            values_R3 = upsampler.at(feat, lr_pixels_R, positions_R)  # type: ignore[operator]
            residual_LP3 = residual_LP3.index_put((lr_pixels_R, positions_R), values_R3)
        residual = _as_images(residual_LP3.flatten(0, 1), lr, self.scale)
        sr = finished(self.model, lr, residual, self.scale)
        classes = _as_images(classes_N[:, None], lr, self.scale)
        if self.refinement:
            sr = _refined(sr, classes)
        return sr, classes[:, 0].to(torch.uint8)

    def _classes(self, logits_NM: Tensor, k: Tensor) -> Tensor:
        """(N,) int32; see `models.routing.KRouting`."""
        k = k.clamp(-MAX_K, MAX_K)
        best = torch.zeros_like(logits_NM[:, 0])
        classes = best.to(torch.int32)
        for j in range(1, len(self.log_costs)):
            margin = logits_NM[:, j] - logits_NM[:, 0]
            score = margin - k * (self.log_costs[j] - self.log_costs[0])
            better = score > best
            classes = torch.where(better, torch.full_like(classes, j), classes)
            best = torch.where(better, score, best)
        return classes


class UniformGraph(nn.Module):
    """A model at one integer scale, all pixels through one upsampler.

    ``forward(lr)`` takes `lr` (B, 3, h, w) float RGB in [0, 1] and returns SR (B, 3, H, W), not
    clamped.

    Args:
        model: a PCSR model of any phase, in eval mode.
        scale: output pixels per LR pixel, on each axis.
        index: of the upsampler, 0 the lightest.
    """

    def __init__(self, model: PCSR, scale: int, index: int = -1) -> None:
        super().__init__()
        self.model = model
        self.scale = scale
        self.upsampler = PhasedSampler(model.upsamplers[index], scale)

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1] to (B, 3, H, W), not clamped."""
        residual = self.upsampler.everywhere(self.model.encode(lr))
        return finished(self.model, lr, _as_images(residual, lr, self.scale), self.scale)


class PhasedSampler(nn.Module):
    """A sampler at an integer scale, its first layer split as `LIIFSampler.dense` does.

    Output pixels are numbered by image, LR row, LR column, and position within the LR pixel, row by
    row.
    """

    phase_PD: Tensor

    def __init__(self, sampler: LIIFSampler, scale: int) -> None:
        super().__init__()
        first, *rest = sampler.imnet.linears
        weight = first.weight.detach()[:, : sampler.in_dim, None, None].clone()
        self.first = nn.Parameter(weight, requires_grad=False)
        self.rest = nn.ModuleList(rest)
        # At an integer scale positions are the same in every LR pixel.
        with torch.no_grad():
            row_DS, col_DS = sampler.geometry(PixelGrid.build((1, 1), (scale, scale)))
        phase_DP = (row_DS[:, :, None] + col_DS[:, None]).flatten(1)
        self.register_buffer("phase_PD", phase_DP.t().contiguous())

    def everywhere(self, feat_BChw: Tensor) -> Tensor:
        """(N, outputs)."""
        return self._layers((self._of_lr(feat_BChw)[:, None] + self.phase_PD).flatten(0, 1))

    def at(self, feat_BChw: Tensor, lr_pixels_R: Tensor, positions_R: Tensor) -> Tensor:
        """(R, outputs), for the pixels at these positions of these LR pixels."""
        return self._layers(self._of_lr(feat_BChw)[lr_pixels_R] + self.phase_PD[positions_R])

    def _of_lr(self, feat_BChw: Tensor) -> Tensor:
        """The first layer without position and bias, (B h w, D)."""
        x_BDhw = F.conv2d(feat_BChw, self.first)
        return x_BDhw.permute(0, 2, 3, 1).flatten(0, 2)

    def _layers(self, x: Tensor) -> Tensor:
        for layer in self.rest:
            x = layer(x.relu())
        return x


def finished(model: PCSR, lr: Tensor, residual_B3HW: Tensor, scale: int) -> Tensor:
    """The upsamplers' output in the range of images, on the bilinear LR."""
    bilinear = F.interpolate(lr, scale_factor=float(scale), mode="bilinear", align_corners=False)
    return residual_B3HW * model.norm.std + bilinear


def _as_images(values_NO: Tensor, lr: Tensor, scale: int) -> Tensor:
    """Values by number of the pixel, (N, O), to images (B, O, H, W)."""
    batch, _, h, w = lr.shape
    outputs = values_NO.shape[1]
    values = values_NO.view(batch, h, w, scale, scale, outputs).permute(0, 5, 1, 3, 2, 4)
    return values.reshape(batch, outputs, h * scale, w * scale)


def _refined(sr_B3HW: Tensor, classes_B1HW: Tensor) -> Tensor:
    """See `models.refinement.refine`."""
    heaviest = F.max_pool2d(classes_B1HW.to(sr_B3HW.dtype), 3, stride=1, padding=1)
    mean = F.avg_pool2d(sr_B3HW, 3, stride=1, padding=1)
    rows, cols = (torch.arange(n, device=sr_B3HW.device) for n in sr_B3HW.shape[-2:])
    inside_rows = (rows > 0) & (rows < sr_B3HW.shape[-2] - 1)
    inside_cols = (cols > 0) & (cols < sr_B3HW.shape[-1] - 1)
    inside = inside_rows[:, None] & inside_cols
    return torch.where((heaviest > classes_B1HW) & inside, mean, sr_B3HW)
