"""A backbone as the compiled kernels read it in half precision, see rows_amx.h.

Axes: C channels, S slots, O outputs, I inputs, k kernel size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.native.row_plan import (
    IN_HALF,
    TO_HALF,
    PlannedBuffer,
    RowPlan,
    activation_of,
    add_float,
    check_radius,
)
from models.row_graph import RowGraph, Sum

# Outputs of a matrix tile, and of a pair of them, which are the inputs of one.
_TILE, _PAIR = 16, 32


def half_plan(graph: RowGraph, tile: int, margin: int) -> RowPlan:
    """In bfloat16, but for steps that read the image alone: to round it costs more than all else.

    Args:
        tile: the most outputs that are computed at once in float32.
        margin: no kernel's radius may be greater.

    Raises:
        ValueError: a kernel is too large, or the output depends on the image alone.
    """
    lags = graph.lags()
    check_radius(graph, margin)
    if _reads_image_alone(graph.steps[-1]):
        raise ValueError("CPU kernels: the output depends on the image alone")
    groups = _slot_groups(graph)
    plan = RowPlan(graph.channels_of(len(lags) - 1), is_half=True)
    plan.buffers.append(PlannedBuffer(graph.channels, 0))
    places = {n: _slots(graph.channels_of(n), groups.get(n, 1)) for n in range(-1, len(lags))}
    buffer_of: dict[int, int] = {}

    def half_of(source: int) -> int:
        if source == RowGraph.IMAGE and source not in buffer_of:
            buffer_of[source] = _add_conversion(plan, 0, places[source])
        return buffer_of[source]

    for index, step in enumerate(graph.steps):
        if _reads_image_alone(step):
            made = add_float(plan, step, lags[index], tile)
            buffer_of[index] = _add_conversion(plan, made, places[index])
            continue
        sources = [half_of(source) for source in step.sources]
        added = None if step.added is None else half_of(step.added)
        is_diagonal = step.groups > 1 and all(
            groups.get(n) == step.groups for n in (index, *step.sources)
        )
        in_slots = [places[source] for source in step.sources]
        weight = _half_weights(step, in_slots, places[index], is_diagonal=is_diagonal)
        outputs = _slot_count(places[index])
        is_last = index + 1 == len(graph.steps)
        buffer_of[index] = plan.add(
            IN_HALF,
            [
                (buffer, _slot_count(slots), tensor.shape[-1])
                for buffer, slots, tensor in zip(sources, in_slots, step.weights, strict=True)
            ],
            PlannedBuffer(plan.out_channels if is_last else outputs, lags[index], not is_last),
            outputs=outputs,
            groups=step.groups if is_diagonal else 1,
            added=added,
            activation=activation_of(step),
            weight=weight,
            bias=_at_slots(step.bias_C, places[index]),
            slope=_at_slots(step.slope_C, places[index]),
            slots=_runs(places[index]),
        )
    return plan


def _reads_image_alone(step: Sum) -> bool:
    return set(step.sources) == {RowGraph.IMAGE} and step.added is None


def _add_conversion(plan: RowPlan, source: int, slots_C: Tensor) -> int:
    """A buffer in half precision of one in float32."""
    made = plan.buffers[source]
    slots = _slot_count(slots_C)
    return plan.add(
        TO_HALF,
        [(source, made.channels, 1)],
        PlannedBuffer(slots, made.lag, is_half=True),
        outputs=slots,
        slots=slots_C.int(),
    )


def _slot_groups(graph: RowGraph) -> dict[int, int]:
    """Groups of channels that are filled up to a tile, of the steps whose channels are so.

    Raises:
        ValueError: what is added to a step has its channels in other places.
    """
    groups: dict[int, int] = {}
    for index, step in enumerate(graph.steps):
        for number in (index, *step.sources):
            size = graph.channels_of(number) // step.groups
            if step.groups > 1 and _TILE // 2 < size <= _TILE:
                groups.setdefault(number, step.groups)
    pairs = [(n, step.added) for n, step in enumerate(graph.steps) if step.added is not None]
    # From a sum to what is added, then from the first of a chain to the last.
    for one, other in [*((a, n) for n, a in reversed(pairs)), *pairs]:
        if other in groups:
            groups.setdefault(one, groups[other])
    if any(groups.get(n) != groups.get(added) for n, added in pairs):
        raise ValueError("CPU kernels: what is added has its channels in other places")
    return groups


def _slots(channels: int, groups: int) -> Tensor:
    """(C,) each channel's slot."""
    size = channels // groups
    step = _TILE if groups > 1 else size
    return (torch.arange(groups)[:, None] * step + torch.arange(size)).flatten()


def _slot_count(slots_C: Tensor) -> int:
    return -(-(int(slots_C[-1]) + 1) // _PAIR) * _PAIR


def _at_slots(values_C: Tensor, slots_C: Tensor) -> Tensor:
    out_S = torch.zeros(_slot_count(slots_C))
    out_S[slots_C] = values_C
    return out_S


def _runs(slots_C: Tensor) -> Tensor:
    """(S / 16, 2) int32: the first channel and the number of channels of each tile's slots."""
    tiles = slots_C // _TILE
    runs = [
        (int((tiles < t).sum()), int((tiles == t).sum()))
        for t in range(_slot_count(slots_C) // _TILE)
    ]
    return torch.tensor(runs, dtype=torch.int32)


def _half_weights(
    step: Sum, in_slots: Sequence[Tensor], out_slots_O: Tensor, *, is_diagonal: bool
) -> Tensor:
    """Weights by pair of tiles; of each (source, row, column, 32 inputs), the two tiles.

    A tile is (16, 16, 2): pairs of inputs, outputs, the two of the pair.

    Args:
        is_diagonal: a pair of tiles reads only the 32 inputs of its own number.
    """
    outputs = _slot_count(out_slots_O)
    dense = [
        _dense(weight, step.groups, slots_I, out_slots_O, outputs)
        for weight, slots_I in zip(step.weights, in_slots, strict=True)
    ]
    parts = []
    for pair in range(outputs // _PAIR):
        for weight_OIkk in dense:
            own = weight_OIkk[_PAIR * pair : _PAIR * (pair + 1)]
            if is_diagonal:
                own = own[:, _PAIR * pair : _PAIR * (pair + 1)]
            size, blocks = own.shape[-1], own.shape[1] // _PAIR
            tiles = own.reshape(2, _TILE, blocks, _TILE, 2, size, size)
            parts.append(tiles.permute(5, 6, 2, 0, 3, 1, 4).flatten())
    return torch.cat(parts).bfloat16()


def _dense(
    weight_OIkk: Tensor, groups: int, slots_I: Tensor, slots_O: Tensor, outputs: int
) -> Tensor:
    """(outputs, inputs, k, k) with each channel at its slot, and zeros between groups."""
    size = weight_OIkk.shape[-1]
    out = torch.zeros(outputs, _slot_count(slots_I), size, size)
    rows, columns = slots_O.chunk(groups), slots_I.chunk(groups)
    for part, row, column in zip(weight_OIkk.chunk(groups), rows, columns, strict=True):
        out[row[:, None], column] = part
    return out
