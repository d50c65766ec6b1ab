"""Fused CPU kernels in C, compiled on the machine that runs them, and whether they can be used.

They need a C compiler (`cc`, `gcc` or `clang`) the first time, for two seconds; what it makes is
kept in the user's cache folder. Without one, plain torch is used.
"""

import functools
import logging
import os

from models.native.bindings import Library
from models.native.compiler import build
from utils.errors import UserError

_log = logging.getLogger(__name__)
SWITCH = "PCSR_NATIVE"


@functools.cache
def library() -> Library | None:
    """The kernels; None where there is no compiler, or PCSR_NATIVE=0 switches them off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return Library(build())
    except UserError as error:
        _log.info("%s; plain torch is used, which is slower", error)
        return None
