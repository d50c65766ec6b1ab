"""Registries: named builders that refuse what they do not know."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from utils.errors import UserError
from utils.registry import Registry


@pytest.fixture
def registry() -> Registry:
    """A registry of one class and one function, which builds a nested spec."""
    registry = Registry("shape")

    @registry.register("square")
    class Square:
        def __init__(self, *, side: float, filled: bool = False, colour: str | None = None) -> None:
            if side <= 0:
                raise ValueError(f"side {side} is not positive\nreally")
            self.side, self.filled, self.colour = side, filled, colour

    @registry.register("row")
    def make_row(
        *,
        item: Mapping[str, Any],
        counts: Sequence[int] = (1,),
        order: Literal["up", "down"] = "up",
        scale: float = 1.0,
    ) -> list[Square]:
        return [registry.make(item, "item", side=scale) for _ in range(sum(counts))]

    return registry


def test_builds_without_changing_the_spec(registry: Registry) -> None:
    spec = {"name": "row", "args": {"item": {"name": "square"}, "counts": [1, 2.0]}}
    row = registry.make(spec, scale=2, unknown_to_the_builder=1)
    assert [square.side for square in row] == [2, 2, 2]
    assert spec == {"name": "row", "args": {"item": {"name": "square"}, "counts": [1, 2.0]}}


def test_duplicate_leaves_the_registry_as_it_was(registry: Registry) -> None:
    with pytest.raises(ValueError, match="shape `square` is registered already"):
        registry.register("square")(dict)
    assert registry.make({"name": "square", "args": {"side": 1}}).side == 1
    assert registry.names() == ["row", "square"]
    assert "square" in registry and "circle" not in registry


def test_defaults(registry: Registry) -> None:
    assert registry.defaults("square") == {"filled": False, "colour": None}


SQUARE = {"name": "square"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("square", "config: `a.b` must be a mapping with a `name`"),
        ({"args": {}}, "config: `a.b` must be a mapping with a `name`"),
        (
            {"name": "sqare"},
            r"`a.b`: unknown shape `sqare` \(did you mean `square`\?\); known",
        ),
        ({"name": "square", "arg": {}}, r"unknown key `a.b.arg` \(did you mean `args`\?\)"),
        ({"name": "square", "args": [1]}, "`a.b.args` must be a mapping"),
        ({"name": "square"}, "`a.b.args.side` is missing"),
        (
            {"name": "square", "args": {"side": 1, "fill": True}},
            r"unknown key `a.b.args.fill` \(did you mean `filled`\?\); `square` takes: side",
        ),
        ({"name": "square", "args": {"side": "1"}}, "`a.b.args.side` must be a number, not '1'"),
        ({"name": "square", "args": {"side": float("nan")}}, "`a.b.args.side` must be a number"),
        ({"name": "square", "args": {"side": 1, "filled": 1}}, "`a.b.args.filled` must be true or"),
        ({"name": "square", "args": {"side": 1, "colour": 3}}, "`a.b.args.colour` must be text"),
        ({"name": "square", "args": {"side": -1}}, "cannot be built from {'side': -1}: side -1 is"),
        ({"name": "row", "args": {"item": 3}}, "`a.b.args.item` must be a mapping, not 3"),
        (
            {"name": "row", "args": {"item": SQUARE, "counts": [1.5]}},
            "`a.b.args.counts` must be a list of whole numbers",
        ),
        (
            {"name": "row", "args": {"item": SQUARE, "order": "left"}},
            "`a.b.args.order` must be one of up, down, not 'left'",
        ),
        (
            {"name": "row", "args": {"item": {"name": "square", "args": {"fil": 1}}}},
            "unknown key `a.b.args.item.args.fil`",
        ),
        (
            {"name": "square", "args": {"side": [1] * 99}},
            r"must be a number, not \[1, 1.*\.\.\.$",
        ),
    ],
)
def test_wrong_specs_are_named_by_their_path(registry: Registry, spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        registry.make(spec, "a.b", scale=1)
    assert "\n" not in str(caught.value)


def test_paths_start_afresh_after_an_error(registry: Registry) -> None:
    with pytest.raises(UserError):
        registry.make({"name": "row", "args": {"item": {"name": "oval"}}})
    with pytest.raises(UserError, match="config: `shape`: unknown shape `oval`"):
        registry.make({"name": "oval"})
