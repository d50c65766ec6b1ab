"""Fused GPU kernels in Triton, and whether they can be used here.

Importing this package needs no Triton; importing its other modules does. CUDA builds of torch
bring it. With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported, Triton's
interpreter runs the kernels on a CPU: slowly, for tests.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

from models.backbones.base import SRNetwork
from models.streams import Encoder
from utils.errors import first_line

_log = logging.getLogger(__name__)

# The first with matrix units for bf16 and for float32 in parts.
_LEAST_CAPABILITY = (8, 0)


def available(device: torch.device) -> bool:
    """Whether the kernels run on `device`."""
    return why_unavailable(device) is None


def why_unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on `device`; None where they do."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the kernels are for CUDA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels are for CUDA GPUs"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"compute capability 8.0 or newer is needed, this GPU has {major}.{minor}"
    return _failure(device)


@functools.cache
def _failure(device: torch.device) -> str | None:
    """What happens when a kernel is compiled and run: Triton needs a C compiler, for one."""
    from models.kernels.partition import Partition

    try:
        classes = torch.tensor([[[1, 0, 1]]], dtype=torch.uint8, device=device)
        counts = Partition.of(classes, 2).counts()
    except Exception as error:
        reason = first_line(error)
        _log.warning("the fused kernels cannot be used, plain torch is: %s", reason)
        return reason
    return None if counts == [1, 2] else f"a test kernel counted {counts} instead of [1, 2]"


def agrees(what: str, device: torch.device, is_right: Callable[[], bool]) -> bool:
    """Whether a kernel can be used on `device`; where it fails or is wrong, a line says so.

    Args:
        what: it does.
        is_right: runs it on a small example, and compares with plain torch.
    """
    if not available(device):
        return False
    try:
        right, reason = is_right(), "it is wrong"
    except Exception as error:  # Triton's are of many kinds
        right, reason = False, first_line(error)
    if not right:
        _log.warning("fused kernels: no %s by them, plain torch is used: %s", what, reason)
    return right


# Of a backbone's features, relative to plain torch.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def fused_encoder(network: SRNetwork, dtype: torch.dtype = torch.float32) -> Encoder:
    """``network.fused(dtype)``, or the same by the fused kernels where they are made for it.

    Sums and products of float32 are exact up to rounding, whatever PyTorch's convolutions do.
    Where a kernel does not compile, or is wrong, a line says so.
    """
    device = next(network.parameters()).device
    graph = network.graph()
    if graph is None or not available(device):
        return network.fused(dtype)
    from models.kernels.encoder import GraphEncoder  # needs Triton

    x = torch.rand(1, 3, 7, 19, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        encoder = GraphEncoder(graph, dtype)
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            ours, theirs = encoder(x).float(), graph(x)
    except ValueError:  # they are not made for it
        return network.fused(dtype)
    except Exception as error:  # Triton's are of many kinds
        _log.warning(
            "fused kernels: no backbone by them, plain torch is used: %s", first_line(error)
        )
        return network.fused(dtype)
    # Weights that are no numbers say nothing of the kernels.
    same_nan = torch.equal(ours.isnan(), theirs.isnan())
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if same_nan and bool((ours - theirs).norm() <= _TOLERANCE[dtype] * theirs.norm()):
        return encoder
    _log.warning("fused kernels: their features are wrong; plain torch is used instead")
    return network.fused(dtype)
