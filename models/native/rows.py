"""Backbones by the compiled kernels: their features from an image's rows, as they come.

Axes: B batch, C channels, h w LR, r rows.
"""

import contextlib
import ctypes
import itertools
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.native.bindings import Library
from models.row_graph import RowGraph, Sum
from models.streams import push_whole

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
# LR pixels of a part that go through all steps at once. What a step reads has just been written: in
# a cache of 2 MB, 2048 take a tenth longer and 4096 a third (measured).
CHUNK_PX = 512
_UNKNOWN_HEIGHT = 2**30
# Where columns are divided: at whole vectors of any processor.
_UNIT = 16
_NO_ACTIVATION, _RELU, _SLOPES = range(3)


class _Buffer(ctypes.Structure):
    _fields_ = (("channels", _INT), ("rows", _INT), ("lag", _INT), ("first", _LONG))


class _Source(ctypes.Structure):
    _fields_ = (("buffer", _INT), ("channels", _INT), ("size", _INT))


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("target", "outputs", "groups", "sources")),
        *((name, _INT) for name in ("added", "activation")),
        ("source", ctypes.POINTER(_Source)),
        *((name, _POINTER) for name in ("weight", "bias", "slope")),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("left", "w", "start", "end", "top", "bottom")),
        *((name, _INT) for name in ("stride", "steps")),
        ("buffer", ctypes.POINTER(_Buffer)),
        ("step", ctypes.POINTER(_Step)),
        *((name, _POINTER) for name in ("arena", "zeros")),
        *((name, _INT) for name in ("h", "position", "last_position", "chunk")),
        *((name, _POINTER) for name in ("in_", "out")),
        *((name, _INT) for name in ("in_w", "first_in", "out_stride", "first_out")),
        *((name, _INT) for name in ("lock", "threads", "waiting", "phase", "done")),
        *((name, _INT) for name in ("current", "chunk_end", "first_row", "tasks_per_row")),
        *((name, _LONG) for name in ("next", "tasks")),
    )


class _Parts(ctypes.Structure):
    _fields_ = (("parts", _INT), ("threads", _INT), ("part", ctypes.POINTER(ctypes.POINTER(_Part))))


@dataclass(frozen=True)
class _Packed:
    """A step's tensors in the order that the kernels read them."""

    step: Sum
    weight: Tensor
    bias: Tensor
    slope: Tensor
    activation: int


class NativeRows:
    """A backbone's features by the compiled kernels, in float32: a `models.streams.Encoder`.

    Args:
        library: the compiled kernels.
        graph: what the backbone does.
        chunk_px: LR pixels that go through all steps at once.
    """

    input_dtype = torch.float32

    def __init__(self, library: Library, graph: RowGraph, *, chunk_px: int = CHUNK_PX) -> None:
        self.library = library
        self.graph = graph
        self.chunk_px = chunk_px
        self.lags = [0, *graph.lags()]
        self.channels = [graph.channels_of(index - 1) for index in range(len(self.lags))]
        self._packed = [_pack(step, library.rows_tile) for step in graph.steps]
        self.steps = (_Step * len(graph.steps))(
            *(_step(packed, index) for index, packed in enumerate(self._packed, start=1))
        )
        self._spare: list[tuple[list[Hashable], list[Tensor]]] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, h, w) to features (B, C, h, w), which lie in memory by rows."""
        return push_whole(self.stream(), x)

    def stream(self) -> "NativeRowStream":
        """See `models.streams.Encoder`."""
        return NativeRowStream(self)

    def take_memory(self, layouts: "list[_Layout]") -> list[Tensor]:
        """Memory for each layout's rings, in float32: zero, or what the same rings have left."""
        # To touch new memory takes a system call a page, a third of the time of a small image.
        with contextlib.suppress(IndexError):
            kinds, spare = self._spare.pop()
            if kinds == [layout.kind for layout in layouts]:
                return spare
        return [torch.zeros(layout.size) for layout in layouts]

    def give_back(self, layouts: "list[_Layout]", arenas: list[Tensor]) -> None:
        """Keep memory for the next image of this size."""
        self._spare[:] = [([layout.kind for layout in layouts], arenas)]


class NativeRowStream:
    """The rows of one batch; a `models.streams.RowStream`."""

    def __init__(self, network: NativeRows) -> None:
        self._network = network
        self._position = 0
        self._together = 1
        self._layouts: list[_Layout] = []
        self._arenas: list[list[Tensor]] = []

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """See `models.streams.RowStream`."""
        network = self._network
        batch, count, w = rows.shape[:3]
        lag, start = network.lags[-1], self._position
        self._position += count
        together = self._prepare(w, count if last else None, batch)
        end = self._position + (lag if last else 0)
        first_out = max(0, start - lag)
        ready = max(0, end - lag) - first_out
        out = torch.empty(batch, ready, network.channels[-1], _stride(network.library, w))
        height = self._position if last else _UNKNOWN_HEIGHT
        run = _Run(network, (start, end), height, first_out)
        for arenas, given, made in zip(
            itertools.cycle(self._arenas),
            rows.float().contiguous().split(together),
            out.split(together),
            strict=False,
        ):
            run(self._layouts, arenas, given, made)
        if last:
            network.give_back(self._layouts * self._together, self._arenas[0])
        margin = network.library.rows_margin
        return out[..., margin : margin + w].permute(0, 1, 3, 2)

    def _prepare(self, w: int, height: int | None, batch: int) -> int:
        """Make rings for the first rows; returns how many images are worked on at once.

        Args:
            height: None where it is not known yet.
        """
        network, threads = self._network, torch.get_num_threads()
        if not self._layouts:
            whole = height is not None
            self._together = threads if whole and batch >= threads else 1
            at_one = 1 if self._together > 1 else threads
            parts = _split(network.library, w, height, at_one, network.lags[-1])
            self._layouts = [_Layout(network, w, height, part) for part in parts]
            layouts = self._layouts * self._together
            # Images that are whole use the same rings one after the other.
            self._arenas = [network.take_memory(layouts) for _ in range(1 if whole else batch)]
        return self._together


@dataclass(frozen=True)
class _Rectangle:
    """What a thread makes of an image: columns and rows, from first to last."""

    columns: tuple[int, int]
    rows: tuple[int, int]


@dataclass(frozen=True)
class _Run:
    """Takes the next rows of images, and writes what they determine.

    Attributes:
        positions: rows that were given before and afterwards; with the last ones, as many more as
            the output lags behind.
        height: of the image, or more than that of any.
        first_out: the first row that is determined.
    """

    network: NativeRows
    positions: tuple[int, int]
    height: int
    first_out: int

    def __call__(
        self, layouts: "list[_Layout]", arenas: list[Tensor], rows: Tensor, out: Tensor
    ) -> None:
        """Of N images, rows (N, r, w, 3) to `out` (N, r', C, stride), each in all `layouts`."""
        parts = [
            self._part(layout, arena, given, made)
            for (given, made, layout), arena in zip(
                (
                    (given, made, layout)
                    for given, made in zip(rows, out, strict=True)
                    for layout in layouts
                ),
                arenas,
                strict=False,
            )
        ]
        pointers = (ctypes.POINTER(_Part) * len(parts))(*(ctypes.pointer(part) for part in parts))
        self.network.library.run_rows(_Parts(parts=len(parts), part=pointers))
        if not all(part.done for part in parts):
            raise MemoryError("CPU kernels: not enough memory for a list of rows")

    def _part(self, layout: "_Layout", arena: Tensor, rows: Tensor, out: Tensor) -> _Part:
        network, (left, right) = self.network, layout.columns
        (start, end), (top, bottom) = layout.rectangle.columns, layout.rectangle.rows
        lag = network.lags[-1]
        return _Part(
            left=left,
            w=right - left,
            start=start - left,
            end=end - left,
            top=top,
            bottom=bottom,
            stride=layout.stride,
            steps=len(network.steps),
            buffer=layout.buffers,
            step=network.steps,
            arena=arena.data_ptr(),
            zeros=arena.data_ptr(),
            h=self.height,
            position=max(self.positions[0], top - lag),
            last_position=min(self.positions[1], bottom + lag),
            chunk=layout.chunk,
            in_=rows.data_ptr(),
            out=out.data_ptr(),
            in_w=rows.shape[1],
            first_in=self.positions[0],
            out_stride=out.shape[-1],
            first_out=self.first_out,
            current=-2,
        )


class _Layout:
    """Where the rings of one part are: a row of zeros, and then one buffer after the other."""

    def __init__(
        self, network: NativeRows, w: int, height: int | None, rectangle: _Rectangle
    ) -> None:
        library, lag = network.library, network.lags[-1]
        self.rectangle = rectangle
        start, end = rectangle.columns
        unit = library.rows_margin
        self.columns = max(0, start - lag) // unit * unit, min(w, end + lag)
        own_w = self.columns[1] - self.columns[0]
        self.stride = _stride(library, own_w)
        self.chunk = max(1, network.chunk_px // own_w)
        most = _UNKNOWN_HEIGHT if height is None else height
        self.chunk = min(self.chunk, most)
        first, buffers = max(network.channels), []
        kept = [min(rows, most) for rows in _ring_rows(network.graph, network.lags, self.chunk)]
        for channels, rows, buffer_lag in zip(network.channels, kept, network.lags, strict=True):
            buffers.append(_Buffer(channels, rows, buffer_lag, first * self.stride))
            first += channels * rows
        self.buffers = (_Buffer * len(buffers))(*buffers)
        self.size = first * self.stride
        # Memory of the same kind has its margins, which stay zero, in the same places.
        self.kind = own_w, self.stride, tuple(kept)


def _stride(library: Library, w: int) -> int:
    """Between the channels of a row: an odd number of cache lines.

    With an even one, the channels would share a few sets of the cache.
    """
    margin, group = library.rows_margin, library.rows_group
    stride = -(-w // group) * group + 2 * margin
    return stride + (margin if stride // margin % 2 == 0 else 0)


def _split(
    library: Library, w: int, height: int | None, threads: int, radius: int
) -> list[_Rectangle]:
    """An image in parts, of as little as possible that two of them compute.

    Where it is not whole (`height` is None), by columns only.
    """

    def cost(count: int, size: int, unit: int) -> float:
        # What one of `count` computes of `size` columns or rows, with half the radius at each edge
        # that it shares on average over the steps.
        own = -(-(size / count + radius * (count - 1) / count) // unit) * unit
        # Threads that share a part wait for each other (measured, with two).
        speed = 1 if count == threads else 0.7 * threads / count
        return own / speed / (-(-size // unit) * unit)

    units = -(-w // _UNIT)
    ways = [(cost(n, w, library.rows_group), True, n) for n in range(1, min(threads, units) + 1)]
    if height is not None:
        ways += [(cost(n, height, 1), False, n) for n in range(1, min(threads, height) + 1)]
    _, by_columns, count = min(ways)
    rows = 0, _UNKNOWN_HEIGHT if height is None else height
    if by_columns:
        ends = [min(w, n * units // count * _UNIT) for n in range(count + 1)]
        return [_Rectangle(pair, rows) for pair in itertools.pairwise(ends)]
    ends = [n * rows[1] // count for n in range(count + 1)]
    return [_Rectangle((0, w), pair) for pair in itertools.pairwise(ends)]


def _ring_rows(graph: RowGraph, lags: list[int], chunk: int) -> list[int]:
    """Rows that each buffer has to hold, for those that are read last; none of the last one."""
    behind = [0] * len(lags)
    for index, step in enumerate(graph.steps):
        lag = lags[index + 1]
        for source, weight in zip(step.sources, step.weights, strict=True):
            wait = lag - lags[source + 1] + weight.shape[-1] // 2
            behind[source + 1] = max(behind[source + 1], wait)
        if step.added is not None:
            behind[step.added + 1] = max(behind[step.added + 1], lag - lags[step.added + 1])
    return [*(chunk + wait for wait in behind[:-1]), 0]


def _pack(step: Sum, tile: int) -> _Packed:
    """Weights by group and tile; of each (source, row, input, column, output)."""
    parts = []
    outputs = len(step.bias_C) // step.groups
    count = -(-outputs // tile)
    for group in range(step.groups):
        for t in range(count):
            ends = (group * outputs + n * outputs // count for n in (t, t + 1))
            chosen = slice(*ends)
            parts += [weight[chosen].permute(2, 1, 3, 0).flatten() for weight in step.weights]
    slopes = set(step.slope_C.tolist())
    activation = _RELU if slopes == {0.0} else _NO_ACTIVATION if slopes == {1.0} else _SLOPES
    return _Packed(step, torch.cat(parts), step.bias_C.clone(), step.slope_C.clone(), activation)


def _step(packed: _Packed, target: int) -> _Step:
    step = packed.step
    sources = [
        _Source(source + 1, weight.shape[1], weight.shape[-1])
        for source, weight in zip(step.sources, step.weights, strict=True)
    ]
    return _Step(
        target=target,
        outputs=len(step.bias_C),
        groups=step.groups,
        sources=len(sources),
        added=-1 if step.added is None else step.added + 1,
        activation=packed.activation,
        source=(_Source * len(sources))(*sources),
        weight=packed.weight.data_ptr(),
        bias=packed.bias.data_ptr(),
        slope=packed.slope.data_ptr(),
    )
