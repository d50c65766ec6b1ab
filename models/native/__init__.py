"""Fused CPU kernels in C, compiled on the machine that runs them, and whether they can be used.

Compiling takes a C compiler (CC, or `cc`, `gcc` or `clang`) and two seconds; the result is kept in
the user's cache folder, for all machines with the same processor. Without it, plain torch is used.
"""

import functools
import logging
import os

from models.native.bindings import Library
from models.native.compiler import load
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
