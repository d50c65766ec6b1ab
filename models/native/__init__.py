"""Fused CPU kernels in C, compiled on the machine that runs them, and whether they can be used.

Compiling takes a C compiler (CC, or `cc`, `gcc` or `clang`) and two seconds; the result is kept in
the user's cache folder, for all machines with the same processor. Without it, plain torch is used.
"""

import functools
import logging
import os

import torch

from models.backbones.base import SRNetwork
from models.native.bindings import Library
from models.native.compiler import load
from models.native.rows import NativeRows
from models.streams import Encoder
from utils.cli import one_line
from utils.errors import UserError

_log = logging.getLogger(__name__)
SWITCH = "PCSR_NATIVE"


@functools.cache
def library() -> Library | None:
    """The kernels; None where they cannot be compiled, or PCSR_NATIVE=0 switches them off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return load()
    except (UserError, OSError) as error:
        _log.info("%s; plain torch is used, which is slower", one_line(error))
        return None


# Of what the kernels compute, relative to plain torch.
TOLERANCE = 1e-4
HALF_TOLERANCE = 3e-2
# Of a 3x3 convolution's group in float32: torch's convolutions are as fast from about there on
# (measured: 13 inputs, half the time; 58, nine tenths on a large image and more on a small one).
_MOST_FLOAT_INPUTS = 32


def fused_encoder(network: SRNetwork, dtype: torch.dtype = torch.float32) -> Encoder:
    """``network.fused(dtype)``, or the same by the compiled kernels where they are faster."""
    if next(network.parameters()).device.type != "cpu" or (kernels := library()) is None:
        return network.fused(dtype)
    graph = network.graph()
    if graph is None or (dtype == torch.float32 and graph.most_inputs > _MOST_FLOAT_INPUTS):
        return network.fused(dtype)
    try:
        encoder = NativeRows(kernels, graph, dtype)
    except ValueError:  # they are not made for it
        return network.fused(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, 5, 2 * kernels.group + 3, generator=generator)
    with torch.inference_mode():
        ours, theirs = encoder(x), graph(x)
    tolerance = TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE
    # Weights that are no numbers say nothing of the kernels.
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    if (ours - theirs).norm() <= tolerance * theirs.norm():
        return encoder
    _log.warning("CPU kernels: their features are wrong; plain torch is used instead")
    return network.fused(dtype)
