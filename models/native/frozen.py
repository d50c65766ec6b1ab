"""What phase 1 leaves as it is, by the compiled kernels: backbone and heaviest upsampler.

Axes: B batch, C channels, h w LR, H W output.
"""

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from models import native
from models.backbones.base import SRNetwork
from models.grid import PixelGrid
from models.native.mlp import NativeMLP
from models.sampler import LIIFSampler
from models.streams import Encoder

Packed = tuple[Encoder, NativeMLP]
# Beside the modules, not in them: they are copied and pickled, which what is packed cannot be.
_packed: weakref.WeakKeyDictionary[nn.Module, dict[torch.dtype, tuple[Hashable, Packed]]] = (
    weakref.WeakKeyDictionary()
)


def features_and_residual(
    encoder: SRNetwork, upsampler: LIIFSampler, x: Tensor, grid: PixelGrid
) -> tuple[Tensor, Tensor] | None:
    """Features (B, C, h, w) and the upsampler's output (B, 3, H, W) everywhere, without gradients.

    Under autocast to bfloat16 in half precision, where the processor has a matrix unit. Weights are
    packed again when they have changed, which autograd's counters tell (not so changes by `.data`).

    Args:
        encoder, upsampler: in eval mode.
        x: normalised LR (B, 3, h, w).
        grid: from (h, w) to (H, W).

    Returns:
        None where there are no kernels for it: on other devices, for other types, without a
        compiler, or while torch.compile looks on.
    """
    library = None if torch.compiler.is_compiling() else native.library()
    if library is None or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    weight = next(encoder.parameters())
    if weight.dtype != torch.float32 or weight.is_inference():
        return None
    dtype = torch.float32
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if dtype != torch.bfloat16 or not library.has_half:
            return None
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        packed_encoder, mlp = _pack(library, encoder, upsampler, dtype)
        feat = packed_encoder(x.to(packed_encoder.input_dtype)).float()
        residual = torch.empty(len(x), mlp.out_dim, *grid.out_size)
        library.apply([mlp], feat, grid, residual)
    return feat, residual


def _pack(
    library: native.Library, encoder: SRNetwork, upsampler: LIIFSampler, dtype: torch.dtype
) -> Packed:
    tensors = [*encoder.state_dict(keep_vars=True).values(), *upsampler.parameters()]
    version = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    of_encoder = _packed.setdefault(encoder, {})
    if dtype in of_encoder and of_encoder[dtype][0] == version:
        return of_encoder[dtype][1]
    mlp = NativeMLP.pack(upsampler, library.tile, half=dtype != torch.float32)
    packed = native.fused_encoder(encoder, dtype), mlp
    of_encoder[dtype] = version, packed
    return packed
