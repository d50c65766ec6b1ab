"""A backbone as the compiled kernels read it: buffers and steps. Axes: C channels."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.row_graph import RowGraph, Sum

INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_NO_ACTIVATION, _RELU, _SLOPES = range(3)
IN_FLOAT, TO_HALF, IN_HALF = range(3)


class Buffer(ctypes.Structure):
    """As rows.c has it."""

    _fields_ = (
        *((name, INT) for name in ("channels", "rows", "lag")),
        ("first", LONG),
    )


class Source(ctypes.Structure):
    """As rows.c has it."""

    _fields_ = (("buffer", INT), ("channels", INT), ("size", INT))


class Step(ctypes.Structure):
    """As rows.c has it."""

    _fields_ = (
        *((name, INT) for name in ("target", "outputs", "groups", "sources")),
        *((name, INT) for name in ("added", "activation", "kind")),
        ("source", ctypes.POINTER(Source)),
        *((name, POINTER) for name in ("weight", "bias", "slope", "slots")),
    )


@dataclass(frozen=True)
class PlannedBuffer:
    """Rows of a buffer.

    Attributes:
        channels: of half precision, slots.
        lag: see `rows.c`.
        is_half: pixel-major bfloat16, not channels of float32.
    """

    channels: int
    lag: int
    is_half: bool = False


@dataclass
class RowPlan:
    """What the kernels do: step n makes buffer n + 1, from the image, 0, to the output, the last.

    Attributes:
        reads: of each step, (buffer, radius) of all that it reads.
        out_channels: of the output.
        is_half: the output is pixel-major (rows, w, C), not (rows, C, w); float32 in any case.
        kept: tensors that the steps' addresses are of.
    """

    out_channels: int
    is_half: bool
    buffers: list[PlannedBuffer] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reads: list[list[tuple[int, int]]] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)

    @property
    def lag(self) -> int:
        """Of the output."""
        return self.buffers[-1].lag

    def ring_rows(self, chunk: int) -> list[int]:
        """Rows that each buffer has to hold, for those that are read last; none of the last one."""
        behind = [0] * len(self.buffers)
        for target, reads in enumerate(self.reads, start=1):
            for source, radius in reads:
                wait = self.buffers[target].lag - self.buffers[source].lag + radius
                behind[source] = max(behind[source], wait)
        return [*(chunk + wait for wait in behind[:-1]), 0]

    def add(
        self,
        kind: int,
        sources: Sequence[tuple[int, int, int]],
        target: PlannedBuffer,
        *,
        outputs: int,
        groups: int = 1,
        added: int | None = None,
        activation: int = _NO_ACTIVATION,
        **tensors: Tensor,
    ) -> int:
        """Add a step; returns its buffer.

        Args:
            sources: (buffer, channels of a group, kernel size).
            tensors: weight, bias, slope, slots.
        """
        array = (Source * len(sources))(*(Source(*source) for source in sources))
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        step = Step(
            target=len(self.buffers),
            outputs=outputs,
            groups=groups,
            sources=len(sources),
            added=-1 if added is None else added,
            activation=activation,
            kind=kind,
            source=array,
            **addresses,
        )
        self.kept += [array, *tensors.values()]
        self.steps.append(step)
        self.buffers.append(target)
        also = [] if added is None else [(added, 0)]
        self.reads.append([*((buffer, size // 2) for buffer, _, size in sources), *also])
        return step.target


def float_plan(graph: RowGraph, tile: int, margin: int) -> RowPlan:
    """In float32.

    Args:
        tile: the most outputs that are computed at once.
        margin: no kernel's radius may be greater.

    Raises:
        ValueError: one is.
    """
    check_radius(graph, margin)
    lags = graph.lags()
    plan = RowPlan(graph.channels_of(len(lags) - 1), is_half=False)
    plan.buffers.append(PlannedBuffer(graph.channels, 0))
    for step, lag in zip(graph.steps, lags, strict=True):
        add_float(plan, step, lag, tile)
    return plan


def check_radius(graph: RowGraph, margin: int) -> None:
    """ValueError where a kernel's radius is greater than the margins of rows."""
    if any(step.radius_px > margin for step in graph.steps):
        raise ValueError(f"CPU kernels: a kernel's radius is above {margin}")


def activation_of(step: Sum) -> int:
    """As rows.c names it."""
    slopes = set(step.slope_C.tolist())
    return _RELU if slopes == {0.0} else _NO_ACTIVATION if slopes == {1.0} else _SLOPES


def add_float(plan: RowPlan, step: Sum, lag: int, tile: int) -> int:
    """Add a step in float32; returns its buffer.

    Its weights lie by group and tile; in each by (source, row, input, column, output).
    """
    parts = []
    outputs = len(step.bias_C) // step.groups
    count = -(-outputs // tile)
    for group in range(step.groups):
        for t in range(count):
            ends = (group * outputs + n * outputs // count for n in (t, t + 1))
            chosen = slice(*ends)
            parts += [weight[chosen].permute(2, 1, 3, 0).flatten() for weight in step.weights]
    return plan.add(
        IN_FLOAT,
        [
            (source + 1, weight.shape[1], weight.shape[-1])
            for source, weight in zip(step.sources, step.weights, strict=True)
        ],
        PlannedBuffer(len(step.bias_C), lag),
        outputs=len(step.bias_C),
        groups=step.groups,
        added=None if step.added is None else step.added + 1,
        activation=activation_of(step),
        weight=torch.cat(parts),
        bias=step.bias_C.clone(),
        slope=step.slope_C.clone(),
    )
