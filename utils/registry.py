"""Named builders, made from specs of the form ``{name: ..., args: {...}}``."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import Any

from utils.errors import UserError
from utils.typed import conform

# Where the spec that is being built stands in the config; builders build specs inside theirs.
_outer: ContextVar[str | None] = ContextVar("outer", default=None)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean `x`?)`` for the known word closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" (did you mean `{matches[0]}`?)" if matches else ""


class Registry:
    """Maps names to builders (classes or functions with keyword-only arguments).

    Args:
        kind: what is registered, in the singular, for messages ("model", "dataset").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Callable[..., Any]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._builders

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._builders)

    def defaults(self, name: str) -> dict[str, Any]:
        """The default arguments of the builder registered as `name`."""
        parameters = inspect.signature(self._builders[name]).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated builder as `name`. A name that is taken raises ValueError."""

        def add(builder: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._builders:
                raise ValueError(f"{self.kind} `{name}` is registered already")
            self._builders[name] = builder
            return builder

        return add

    def make(self, spec: Mapping[str, Any], where: str | None = None, **runtime: Any) -> Any:
        """Build what `spec` describes. `spec` is never changed.

        Args:
            spec: ``{name, args}``; `args` may be absent. Only these two keys are read; others are
                refused, except `sd` (a checkpoint's state dict, which its loader handles).
            where: path of the spec inside the config, for messages; inside a builder, from the
                arguments of the spec that it builds.
            runtime: arguments that the program adds; those that the builder does not take are
                left out. They are not part of the config.

        Raises:
            UserError: malformed spec, unknown name (the known ones are listed), unknown or missing
                argument, or arguments that the builder cannot work with.
        """
        where = where or self.kind
        if (outer := _outer.get()) is not None:
            where = f"{outer}.args.{where}"
        builder = self._builders[self._checked_name(spec, where)]
        args = self._checked_args(spec, where, builder, runtime)
        parameters = inspect.signature(builder).parameters
        extra = {name: value for name, value in runtime.items() if name in parameters}
        token = _outer.set(where)
        try:
            return builder(**args, **extra)
        except UserError:
            raise
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(
                f"config: `{where}`: {self.kind} `{spec['name']}` cannot be built from {args}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        finally:
            _outer.reset(token)

    def _checked_args(
        self,
        spec: Mapping[str, Any],
        where: str,
        builder: Callable[..., Any],
        runtime: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The spec's arguments, each of the type that the builder declares."""
        args = dict(spec.get("args") or {})
        parameters = inspect.signature(builder).parameters
        allowed = [name for name in parameters if name not in runtime]
        for key in args:
            if key not in allowed:
                raise UserError(
                    f"config: unknown key `{where}.args.{key}`{nearest(key, allowed)}; "
                    f"`{spec['name']}` takes: {', '.join(allowed) or 'no arguments'}"
                )
        for name, parameter in parameters.items():
            required = parameter.default is inspect.Parameter.empty
            if required and name not in args and name not in runtime:
                raise UserError(f"config: `{where}.args.{name}` is missing")
        kinds = typing.get_type_hints(builder.__init__ if inspect.isclass(builder) else builder)
        return {
            key: conform(value, kinds.get(key, Any), f"{where}.args.{key}")
            for key, value in args.items()
        }

    def _checked_name(self, spec: Any, where: str) -> str:
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise UserError(f"config: `{where}` must be a mapping with a `name` (and `args`)")
        for key in spec:
            if key not in ("name", "args", "sd"):
                raise UserError(
                    f"config: unknown key `{where}.{key}`{nearest(key, ('name', 'args'))}"
                )
        if not isinstance(spec.get("args") or {}, Mapping):
            raise UserError(f"config: `{where}.args` must be a mapping")
        name = spec["name"]
        if name not in self._builders:
            raise UserError(
                f"config: `{where}`: unknown {self.kind} `{name}`{nearest(name, self._builders)}; "
                f"known: {', '.join(self.names())}"
            )
        return name
