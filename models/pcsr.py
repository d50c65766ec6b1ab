"""PCSR: a backbone, pixel-level upsamplers from light to heavy, and a pixel-level classifier.

"Accelerating Image Super-Resolution Networks with Pixel-Level Classification" (ECCV 2024).
Axes: B batch, C channels, h w LR, H W output, M upsamplers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.base import SRNetwork
from models.grid import PixelGrid
from models.native.frozen import features_and_residual
from models.normalise import DataNorm
from models.registry import MODELS
from models.sampler import LIIFSampler
from utils.errors import UserError


class PCSR(nn.Module):
    """Super-resolution with one of M upsamplers per output pixel.

    `lr` is always (B, 3, h, w) float RGB in [0, 1], any h, w >= 1; outputs are (B, 3, H, W) for any
    H, W >= 1, the bilinear LR included, not clamped.

    Args:
        encoder: backbone, `no_upsampling` set.
        upsamplers: pixel-level upsamplers ordered light to heavy, at least one. Their names in the
            state dict are the published ones: the last is `heavy_sampler`, of two the first is
            `light_sampler`; more are `light_sampler`, `light_sampler_1`, ...
        classifier: one logit per upsampler and pixel; None where there is one upsampler (phase 0).
        data_norm: ``{mean, std}``; default the backbone's.

    Attributes:
        uses_kernels: what is frozen runs by compiled kernels where there are any (`models.native`).
    """

    uses_kernels = True

    def __init__(
        self,
        *,
        encoder: SRNetwork,
        upsamplers: Sequence[LIIFSampler],
        classifier: LIIFSampler | None = None,
        data_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not upsamplers or (classifier is None) != (len(upsamplers) == 1):
            raise UserError("PCSR: a classifier goes with two or more upsamplers, none with one")
        self.norm = DataNorm(data_norm, encoder.default_mean)
        self.encoder = encoder
        self._sampler_names = [*_light_names(len(upsamplers) - 1), "heavy_sampler"]
        for name, upsampler in zip(self._sampler_names, upsamplers, strict=True):
            self.add_module(name, upsampler)
        self.classifier = classifier
        self._frozen: tuple[nn.Module, ...] = ()

    @property
    def upsamplers(self) -> list[LIIFSampler]:
        """The upsamplers, light to heavy."""
        return [self.get_submodule(name) for name in self._sampler_names]  # type: ignore[misc]

    def freeze_phase0(self) -> "PCSR":
        """Fix backbone and heaviest upsampler: no gradients, eval mode for good. Returns self."""
        self._frozen = (self.encoder, self.upsamplers[-1])
        for module in self._frozen:
            module.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> "PCSR":
        """Set the mode, except for what is frozen: that stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def encode(self, lr: Tensor) -> Tensor:
        """Features (B, C, h, w) of `lr`."""
        return self.encoder(self.norm.normalise(lr))

    def forward(self, lr: Tensor, size: tuple[int, int]) -> Tensor:
        """Every pixel through the heaviest upsampler: (B, 3, H, W)."""
        grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
        residual = self.upsamplers[-1].dense(self.encode(lr), grid)
        return residual * self.norm.std + grid.bilinear(lr)

    def outputs(self, lr: Tensor, size: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """Every upsampler everywhere, and what the classifier says to it: what phase 1 trains.

        Returns:
            the upsamplers' outputs, light to heavy, each (B, 3, H, W); the logits (B, M, H, W)
            float32.
        """
        grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
        residuals, logits_BMHW = self._everywhere(lr, grid)
        bilinear = grid.bilinear(lr)
        return [r * self.norm.std + bilinear for r in residuals], logits_BMHW

    def mixture(self, lr: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """:meth:`outputs` under the classifier's probabilities: what the published loss looks at.

        Returns:
            the outputs' average under the classifier's probabilities, (B, 3, H, W), and these
            probabilities, (B, M, H, W) float32.
        """
        grid = PixelGrid.build((lr.shape[-2], lr.shape[-1]), size, lr.device)
        residuals, logits_BMHW = self._everywhere(lr, grid)
        probs_BMHW = logits_BMHW.softmax(dim=1)
        weighted = [p * r for p, r in zip(probs_BMHW.split(1, dim=1), residuals, strict=True)]
        mixed = torch.stack(weighted).sum(dim=0)
        return mixed * self.norm.std + grid.bilinear(lr), probs_BMHW

    def _everywhere(self, lr: Tensor, grid: PixelGrid) -> tuple[list[Tensor], Tensor]:
        """All upsamplers' residuals, each (B, 3, H, W), and the logits (B, M, H, W) float32."""
        if self.classifier is None:
            raise UserError("PCSR: a phase 0 model has no classifier")
        *lights, heavy = self.upsamplers
        frozen = None
        x = self.norm.normalise(lr)
        if self._frozen and self.uses_kernels:
            frozen = features_and_residual(self.encoder, heavy, x, grid)
        if frozen is not None:
            feat, heavy_residual = frozen
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
                feat = self.encoder(x)
                heavy_residual = heavy.dense(feat, grid)
        logits_BMHW = self.classifier.dense(feat, grid).float()
        return [*(light.dense(feat, grid) for light in lights), heavy_residual], logits_BMHW


def _light_names(count: int) -> list[str]:
    return ["light_sampler" if i == 0 else f"light_sampler_{i}" for i in range(count)]


def _make_encoder(spec: Mapping[str, Any]) -> SRNetwork:
    # Normalisation is the whole model's affair, so a backbone takes none.
    encoder = MODELS.make(spec, "encoder_spec", data_norm=None)
    if not isinstance(encoder, SRNetwork) or not encoder.no_upsampling:
        raise UserError(
            f"config: `encoder_spec` must name a backbone with `no_upsampling: true`, "
            f"not `{spec['name']}`"
        )
    return encoder


def _make_sampler(spec: Mapping[str, Any], where: str, in_dim: int, out_dim: int) -> LIIFSampler:
    sampler = MODELS.make(spec, where, in_dim=in_dim, out_dim=out_dim)
    if not isinstance(sampler, LIIFSampler):
        raise UserError(f"config: `{where}` must name `liif-sampler`, not `{spec['name']}`")
    return sampler


def _assemble(
    encoder_spec: Mapping[str, Any],
    upsampler_specs: Mapping[str, Mapping[str, Any]],
    classifier_spec: Mapping[str, Any] | None,
    data_norm: Mapping[str, Any] | None,
) -> PCSR:
    """Build the parts; `upsampler_specs` by where they stand in the config, light to heavy."""
    encoder = _make_encoder(encoder_spec)
    upsamplers = [
        _make_sampler(spec, where, encoder.out_dim, 3) for where, spec in upsampler_specs.items()
    ]
    classifier = None
    if classifier_spec is not None:
        classifier = _make_sampler(
            classifier_spec, "classifier_spec", encoder.out_dim, max(1, len(upsamplers))
        )
    model = PCSR(encoder=encoder, upsamplers=upsamplers, classifier=classifier, data_norm=data_norm)
    return model if classifier is None else model.freeze_phase0()


@MODELS.register("pcsr")
def make_pcsr(
    *,
    encoder_spec: Mapping[str, Any],
    upsampler_specs: Sequence[Mapping[str, Any]],
    classifier_spec: Mapping[str, Any] | None = None,
    data_norm: Mapping[str, Any] | None = None,
) -> PCSR:
    """PCSR with any number of upsamplers.

    Args:
        encoder_spec: the backbone, with `no_upsampling: true`.
        upsampler_specs: the upsamplers, light to heavy. With two or more, backbone and heaviest
            upsampler are frozen (phase 1); with one, everything is trained (phase 0).
        classifier_spec: the classifier; left out where there is one upsampler.
        data_norm: ``{mean, std}``; default the backbone's.
    """
    specs = {f"upsampler_specs.{i}": spec for i, spec in enumerate(upsampler_specs)}
    return _assemble(encoder_spec, specs, classifier_spec, data_norm)


@MODELS.register("pcsr-phase0")
def make_phase0(
    *,
    encoder_spec: Mapping[str, Any],
    heavy_sampler_spec: Mapping[str, Any],
    data_norm: Mapping[str, Any] | None = None,
) -> PCSR:
    """Backbone and heaviest upsampler, all of it trained."""
    return _assemble(encoder_spec, {"heavy_sampler_spec": heavy_sampler_spec}, None, data_norm)


@MODELS.register("pcsr-phase1")
def make_phase1(
    *,
    encoder_spec: Mapping[str, Any],
    heavy_sampler_spec: Mapping[str, Any],
    light_sampler_spec: Mapping[str, Any],
    classifier_spec: Mapping[str, Any],
    data_norm: Mapping[str, Any] | None = None,
) -> PCSR:
    """The published two-upsampler model: phase 0's part frozen, light upsampler and classifier."""
    specs = {"light_sampler_spec": light_sampler_spec, "heavy_sampler_spec": heavy_sampler_spec}
    return _assemble(encoder_spec, specs, classifier_spec, data_norm)
