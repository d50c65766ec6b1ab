"""Values from YAML against Python annotations: what builders and configs declare is what counts."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from utils.errors import UserError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


# What a config or a spec may hold, aliases written out, and how deep.
_MOST_VALUES = 100_000
_MOST_LEVELS = 50


def is_tree(value: Any) -> bool:
    """Whether nested mappings and lists end: none holds itself, nor nearly endless repetitions.

    YAML's aliases and pickled references can make values that take for ever to look at.
    """
    sizes: dict[int, float] = {}

    def size(value: Any, level: int) -> float:
        """How many values there are, itself included; infinite for too many levels."""
        if not isinstance(value, (Mapping, list, tuple)):
            return 1
        if level > _MOST_LEVELS:
            return math.inf
        if id(value) not in sizes:
            # Until it is known; who meets it again before that has come from within.
            sizes[id(value)] = math.inf
            values = value.values() if isinstance(value, Mapping) else value
            sizes[id(value)] = 1 + sum(size(each, level + 1) for each in values)
        return sizes[id(value)]

    return size(value, 0) <= _MOST_VALUES


def conform(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation` wants it.

    A number without fraction passes for a whole one (YAML reads ``2e6`` as 2000000.0). Of
    annotations, bool, int, float, str, Literal, lists and mappings of them, and unions are
    understood; whatever else is not checked.

    Raises:
        UserError: it is of another type, or not finite; the message has `where`.
    """
    try:
        return _as_any(value, annotation)
    except TypeError:
        named = [option for option in _options(annotation) if option is not type(None)]
        wanted = " or ".join(map(_describe, named))
        raise UserError(f"config: `{where}` must be {wanted}, not {_brief(value)}") from None


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _as(value: Any, option: Any) -> Any:
    """`value`, converted where nothing is lost; TypeError where it does not fit."""
    origin = typing.get_origin(option) or option
    if origin in (bool, str):
        fits = isinstance(value, origin)
    elif origin is int:
        fits = _is_number(value) and float(value).is_integer()
        value = int(value) if fits else value
    elif origin is float:
        fits = _is_number(value)
    elif origin is type(None):
        fits = value is None
    elif origin is typing.Literal:
        fits = value in typing.get_args(option)
    elif origin in (list, tuple, Sequence):
        fits = isinstance(value, (list, tuple))
        arguments = typing.get_args(option)
        if fits and arguments:
            value = [_as_any(item, arguments[0]) for item in value]
    elif origin in (dict, Mapping):
        fits = isinstance(value, Mapping)
    else:
        fits = True
    if not fits:
        raise TypeError
    return value


def _as_any(value: Any, annotation: Any) -> Any:
    for option in _options(annotation):
        try:
            return _as(value, option)
        except TypeError:
            continue
    raise TypeError


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _describe(option: Any) -> str:
    origin = typing.get_origin(option) or option
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(option)))}"
    if origin in (list, tuple, Sequence):
        item = {bool: "of true or false", int: "of whole numbers", float: "of numbers"}
        return " ".join(["a list", *(item.get(a, "") for a in typing.get_args(option)[:1])]).strip()
    if origin in (dict, Mapping):
        return "a mapping"
    return _WORDS.get(origin, str(origin))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
