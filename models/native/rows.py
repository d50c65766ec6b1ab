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

from models.native.bindings import Library, check_tensor
from models.native.half_plan import half_plan
from models.native.row_plan import INT, LONG, POINTER, Buffer, Step, float_plan
from models.row_graph import RowGraph
from models.streams import push_whole

# LR pixels of a part that go through all steps at once. What a step reads has just been written: in
# a cache of 2 MB, 2048 take a tenth longer and 4096 a third (measured).
CHUNK_PX = 512
_UNKNOWN_HEIGHT = 2**30
_MOST_SPARE_BYTES = 256 * 2**20
# Where columns are divided: at whole vectors of any processor.
_UNIT = 16
# Of a part: of wider rows the cache holds too few (measured: 979 columns take 6 % longer).
_MOST_COLUMNS = 512


class _Part(ctypes.Structure):
    _fields_ = (
        *((name, INT) for name in ("left", "w", "start", "end", "top", "bottom")),
        *((name, INT) for name in ("stride", "half_stride", "steps")),
        ("buffer", ctypes.POINTER(Buffer)),
        ("step", ctypes.POINTER(Step)),
        *((name, POINTER) for name in ("arena", "zeros")),
        *((name, INT) for name in ("h", "position", "last_position", "chunk")),
        *((name, POINTER) for name in ("in_", "out")),
        *((name, INT) for name in ("in_w", "first_in", "out_stride", "first_out")),
        *((name, INT) for name in ("lock", "threads", "waiting", "phase", "done")),
        *((name, INT) for name in ("current", "chunk_end", "first_row", "tasks_per_row")),
        *((name, LONG) for name in ("next", "tasks")),
    )


class _Parts(ctypes.Structure):
    _fields_ = (("parts", INT), ("next", INT), ("part", ctypes.POINTER(ctypes.POINTER(_Part))))


class NativeRows:
    """A backbone's features by the compiled kernels: a `models.streams.Encoder`.

    Args:
        library: the compiled kernels.
        graph: what the backbone does.
        dtype: float32 or, where `library.has_half`, bfloat16: of what is behind the first step.
        chunk_px: LR pixels of a part that go through all steps at once.

    Raises:
        ValueError: the graph or the processor is not made for `dtype`.
    """

    input_dtype = torch.float32

    def __init__(
        self,
        library: Library,
        graph: RowGraph,
        dtype: torch.dtype = torch.float32,
        *,
        chunk_px: int = CHUNK_PX,
    ) -> None:
        self.library = library
        self.chunk_px = chunk_px
        if dtype == torch.float32:
            self.plan = float_plan(graph, library.tile, library.margin)
        elif dtype == torch.bfloat16 and library.has_half:
            self.plan = half_plan(graph, library.tile, library.half_margin)
        else:
            raise ValueError(f"CPU kernels: not made for {dtype} on this processor")
        self.steps = (Step * len(self.plan.steps))(*self.plan.steps)
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
        """Keep memory for the next image of this size, where it is not too much."""
        if sum(arena.nbytes for arena in arenas) > _MOST_SPARE_BYTES:
            return
        self._spare[:] = [([layout.kind for layout in layouts], arenas)]


class NativeRowStream:
    """The rows of one batch; a `models.streams.RowStream`."""

    def __init__(self, network: NativeRows) -> None:
        self._network = network
        self._position = 0
        self._size: tuple[int, int] | None = None
        self._is_over = False
        self._together = 1
        self._layouts: list[_Layout] = []
        self._arenas: list[list[Tensor]] = []

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """See `models.streams.RowStream`.

        Raises:
            ValueError: rows of another size than the first ones, or of no image; or others followed
                the last ones.
        """
        network = self._network
        batch, count, w = rows.shape[:3]
        rows = rows.float().contiguous()
        self._size = self._size or (batch, w)
        shape = (self._size[0], count, self._size[1], network.plan.buffers[0].channels)
        check_tensor("rows", rows, torch.float32, shape)
        if self._is_over or not batch * w or (last and not self._position + count):
            raise ValueError("CPU kernels: rows of no image")
        self._is_over = last
        lag, start = network.plan.lag, self._position
        self._position += count
        together = self._prepare(w, count if last else None, batch)
        end = self._position + (lag if last else 0)
        first_out = max(0, start - lag)
        ready = max(0, end - lag) - first_out
        channels, is_half = network.plan.out_channels, network.plan.is_half
        # Of all columns, at the stride that the kernels use.
        row = (w, channels) if is_half else (channels, _stride(network.library, w))
        out = torch.empty(batch, ready, *row)
        height = self._position if last else _UNKNOWN_HEIGHT
        run = _Run(network, (start, end), height, first_out)
        for arenas, given, made in zip(
            itertools.cycle(self._arenas),
            rows.split(together),
            out.split(together),
            strict=False,
        ):
            run(self._layouts, arenas, given, made)
        if last:
            network.give_back(self._layouts * self._together, self._arenas[0])
        if is_half:
            return out
        margin = network.library.margin
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
            parts = _split(network.library, w, height, at_one, network.plan.lag)
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
        lag = network.plan.lag
        return _Part(
            left=left,
            w=right - left,
            start=start - left,
            end=end - left,
            top=top,
            bottom=bottom,
            stride=layout.stride,
            half_stride=layout.half_stride,
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
            out_stride=out.shape[1] if network.plan.is_half else out.shape[2],
            first_out=self.first_out,
            current=-2,
        )


class _Layout:
    """Where the rings of one part are: a row of zeros, and then one buffer after the other."""

    def __init__(
        self, network: NativeRows, w: int, height: int | None, rectangle: _Rectangle
    ) -> None:
        library, plan, lag = network.library, network.plan, network.plan.lag
        self.rectangle = rectangle
        start, end = rectangle.columns
        unit = library.margin
        self.columns = max(0, start - lag) // unit * unit, min(w, end + lag)
        own_w = self.columns[1] - self.columns[0]
        self.stride = _stride(library, own_w)
        self.chunk = max(1, network.chunk_px // own_w)
        most = _UNKNOWN_HEIGHT if height is None else height
        self.chunk = min(self.chunk, most)
        # In half precision a row is pixels; a tile of them may begin up to one before its end.
        self.half_stride = own_w + 2 * library.half_margin + 2 * unit
        kept = [min(rows, most) for rows in plan.ring_rows(self.chunk)]
        sizes = [
            b.channels * self.half_stride // 2 if b.is_half else b.channels * self.stride
            for b in plan.buffers
        ]
        first, buffers = max(sizes), []
        for buffer, rows, size in zip(plan.buffers, kept, sizes, strict=True):
            buffers.append(Buffer(buffer.channels, rows, buffer.lag, first))
            first += rows * size
        self.buffers = (Buffer * len(buffers))(*buffers)
        # The last row may be read beyond its end, too.
        self.size = first + max(sizes)
        # Memory of the same kind has its margins, which stay zero, in the same places.
        self.kind = own_w, self.stride, tuple(kept)


def _stride(library: Library, w: int) -> int:
    """Between the channels of a row, in floats: an odd number of cache lines (of 64 bytes).

    With an even one, the channels would share a few sets of the cache.
    """
    margin, group = library.margin, library.group
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
    ways = [(cost(n, w, library.group), True, n) for n in range(1, min(threads, units) + 1)]
    if height is not None:
        ways += [(cost(n, height, 1), False, n) for n in range(1, min(threads, height) + 1)]
    _, by_columns, count = min(ways)
    rows = 0, _UNKNOWN_HEIGHT if height is None else height
    if by_columns:
        # Narrow enough for the cache, however many parts a thread then has one after the other.
        count *= max(1, -(-w // (count * _MOST_COLUMNS)))
        count = min(count, units)
        ends = [min(w, n * units // count * _UNIT) for n in range(count + 1)]
        return [_Rectangle(pair, rows) for pair in itertools.pairwise(ends)]
    ends = [n * rows[1] // count for n in range(count + 1)]
    return [_Rectangle((0, w), pair) for pair in itertools.pairwise(ends)]
