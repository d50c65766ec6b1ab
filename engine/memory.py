"""A lack of memory as an error that says what to do."""

import contextlib
from collections.abc import Iterator

import torch

from utils.errors import UserError

# On a CPU torch raises a plain RuntimeError that says so.
_WORDS = ("allocate memory", "not enough memory", "out of memory")


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of whichever kind, was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


@contextlib.contextmanager
def memory_named(message: str) -> Iterator[None]:
    """Turn a lack of memory into a UserError with this message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        raise UserError(message) from error
