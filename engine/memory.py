"""A lack of memory as an error that says what to do."""

import contextlib
from collections.abc import Iterator

import torch

from utils.errors import UserError

# On a CPU torch raises a plain RuntimeError that says so.
_WORDS = ("allocate memory", "not enough memory", "out of memory")


@contextlib.contextmanager
def memory_named(message: str) -> Iterator[None]:
    """Turn a lack of memory, of whichever kind, into a UserError with this message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not of_memory and not any(words in str(error) for words in _WORDS):
            raise
        raise UserError(message) from error
