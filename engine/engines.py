"""Which engine runs a PCSR model."""

import logging
from typing import Literal

import torch

from models import kernels, native
from models.compiled import CompiledEncoder
from models.fast import FastEngine
from models.inference import Engine
from models.native_engine import NativeEngine
from models.pcsr import PCSR
from models.reference import PIXEL_BATCH_SIZE, ReferenceEngine
from utils.device import resolve_precision
from utils.errors import UserError

_log = logging.getLogger(__name__)

EngineName = Literal["fast", "reference"]
ENGINES: tuple[EngineName, ...] = ("fast", "reference")


def make_engine(
    model: PCSR,
    name: EngineName = "fast",
    pixel_batch_size: int = PIXEL_BATCH_SIZE,
    precision: str = "fp32",
    *,
    compiled: bool = False,
) -> Engine:
    """The engine called `name`, holding at most `pixel_batch_size` pixels in an MLP at once.

    Args:
        compiled: the fast engine's encoder by torch.compile.

    Raises:
        UserError: the reference engine in another precision than fp32, or compiled.
    """
    dtype = resolve_precision(precision, model.norm.mean.device)
    if name == "reference":
        if dtype != torch.float32:
            raise UserError(f"--engine reference works in fp32, not {precision}")
        if compiled:
            raise UserError("--engine reference is not compiled: leave --compile out")
        return ReferenceEngine(model, pixel_batch_size=pixel_batch_size)
    encoder = CompiledEncoder(model.encoder, dtype) if compiled else None
    device = model.norm.mean.device
    if device.type != "cpu" and kernels.available(device):
        from models.fused import FusedEngine  # needs Triton

        try:
            return FusedEngine(model, dtype=dtype, encoder=encoder)
        except UserError as error:
            _log.warning("%s; plain torch is used instead", error)
    if device.type == "cpu" and (library := native.library()) is not None:
        try:
            return NativeEngine(library, model, dtype=dtype, encoder=encoder)
        except UserError as error:
            _log.warning("%s; plain torch is used instead", error)
    return FastEngine(model, chunk_px=pixel_batch_size, dtype=dtype, encoder=encoder)
