"""A backbone that torch.compile made one program of."""

import torch
from torch import Tensor

from models.backbones.base import SRNetwork
from models.fuse import fused_copy
from models.streams import RowStream
from utils.errors import UserError, first_line

# torch's own names: importing them takes a second.
_MISSING = ("InvalidCxxCompiler", "TritonMissing", "GPUTooOldForTriton")


class CompiledEncoder:
    """Features of a network, compiled at the first image and again for other sizes.

    Images are worked on whole: there is no stream of rows.

    Args:
        network: in eval mode, on its device; its weights are copied.
        dtype: of weights and activations.
    """

    def __init__(self, network: SRNetwork, dtype: torch.dtype = torch.float32) -> None:
        self.input_dtype = dtype
        fused = fused_copy(network).to(dtype)
        self._features = torch.compile(fused.features)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, h, w) to features (B, C, h, w).

        Raises:
            UserError: there is no working compiler.
        """
        try:
            return self._features(x)
        except RuntimeError as error:
            reason = missing_compiler(error)
            if reason is None:
                raise
            raise UserError(
                f"--compile needs a working compiler ({reason}): install g++ (and, for a GPU, "
                f"triton), or leave --compile out"
            ) from error

    def stream(self) -> RowStream | None:
        """None."""
        return None


def missing_compiler(error: BaseException) -> str | None:
    """What torch says of a compiler that it needs and that is not there; None of other errors."""
    cause = getattr(error, "inner_exception", error)
    name = type(cause).__name__
    if name not in _MISSING and not isinstance(cause, FileNotFoundError):
        return None
    return first_line(cause)
