"""Networks as streams of rows: exact, in memory that does not grow with the image's height.

A stream takes an image's rows from top to bottom in runs of any length and gives its output rows
as soon as they are determined. Convolutions keep the few input rows that the next run needs, so
nothing is computed twice (tiles with a halo would compute a fifth again) and the result is that of
the whole image. (:class:`HaloRows`, for GPUs, is as exact, but computes a few rows twice.)

Rows are (B, r, w, C), contiguous: channels-last convolutions read them as they are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RowStream(Protocol):
    """Takes rows and gives rows; the output lags behind by the stream's radius."""

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """Take the next rows (B, r, w, C); `last` says that no more follow.

        Returns:
            the output rows (B, r', w, C') that are determined now and were not before. Where none
            is, r' is 0 and C' may be any number.
        """
        ...


class Encoder(Protocol):
    """A backbone prepared for inference."""

    @property
    def input_dtype(self) -> torch.dtype:
        """What it takes; what it gives may be narrower."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, h, w) to features (B, C, h, w)."""
        ...

    def stream(self) -> RowStream | None:
        """A new stream of the same function, for one batch; None where there is none."""
        ...


class ConvRows:
    """A convolution of odd kernel size, stride 1 and zero padding that keeps the size.

    :meth:`push` is :meth:`store` and :meth:`convolve`; who needs the stored rows calls these.

    Args:
        conv: its weights are read, not copied where they are channels-last already.
        relu_first: apply ReLU to the input, on its way into the convolution's own memory: so it
            costs no pass of its own.
    """

    def __init__(self, conv: nn.Conv2d, *, relu_first: bool = False) -> None:
        self._weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._radius = conv.kernel_size[0] // 2
        self._groups = conv.groups
        self._relu_first = relu_first
        self._kept: Tensor | None = None
        self._stored: Tensor | None = None
        self._padding_rows = 0

    def push(self, rows: Tensor, last: bool) -> Tensor:
        self.store(rows, last)
        return self.convolve()

    def store(self, rows: Tensor, last: bool) -> Tensor:
        """Take the next rows, which may be overwritten. Returns them, after ReLU where asked."""
        if self._kept is None and last:
            self._stored, self._padding_rows = rows, self._radius
            return rows.relu_() if self._relu_first else rows
        before = self._radius if self._kept is None else self._kept.shape[1]
        end = before + rows.shape[1]
        after = self._radius if last else 0
        stored = rows.new_empty(len(rows), end + after, *rows.shape[2:])
        if self._kept is None:
            stored[:, :before] = 0
        else:
            stored[:, :before] = self._kept
        stored[:, end:] = 0
        inside = stored[:, before:end]
        if self._relu_first:
            torch.clamp_min(rows, 0, out=inside)
        else:
            inside.copy_(rows)
        self._stored, self._padding_rows = stored, 0
        return inside

    def convolve(self) -> Tensor:
        """The output rows that the stored ones determine."""
        assert self._stored is not None
        rows, padding_rows = self._stored, self._padding_rows
        self._stored = None
        if not padding_rows:
            ready = rows.shape[1] - 2 * self._radius
            self._kept = rows[:, max(0, ready) :]
            if ready <= 0:
                return rows[:, :0]
        y = F.conv2d(
            rows.permute(0, 3, 1, 2),
            self._weight,
            self._bias,
            padding=(padding_rows, self._radius),
            groups=self._groups,
        )
        return y.permute(0, 2, 3, 1).contiguous()


class PointwiseRows:
    """A function of one position at a time: a 1x1 convolution or an activation.

    Args:
        function: (B, C, r, w) to (B, C', r, w).
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def push(self, rows: Tensor, last: bool) -> Tensor:
        return self._function(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


class ChainRows:
    """Streams one after another."""

    def __init__(self, *streams: RowStream) -> None:
        self._streams = streams

    def push(self, rows: Tensor, last: bool) -> Tensor:
        for stream in self._streams:
            if rows.shape[1] == 0 and not last:
                break
            rows = stream.push(rows, last)
        return rows


class ResidualRows:
    """x + body(x)."""

    def __init__(self, body: RowStream) -> None:
        self._body = body
        self._waiting = RowQueue()

    def push(self, rows: Tensor, last: bool) -> Tensor:
        self._waiting.put(rows)
        return self._waiting.add_to(self._body.push(rows, last))


class RowQueue:
    """Rows that wait for those of a stream that lags behind; they are not copied."""

    def __init__(self) -> None:
        self._parts: deque[Tensor] = deque()

    def put(self, rows: Tensor) -> None:
        """Add rows at the end."""
        if rows.shape[1]:
            self._parts.append(rows)

    def take(self, count: int) -> list[Tensor]:
        """Remove the first `count` rows, in the pieces that they came in; there are as many."""
        pieces = []
        while count:
            part = self._parts.popleft()
            pieces.append(part[:, :count])
            if part.shape[1] > count:
                self._parts.appendleft(part[:, count:])
            count -= pieces[-1].shape[1]
        return pieces

    def add_to(self, rows: Tensor) -> Tensor:
        """Add the next rows to as many others, in place; returns those."""
        for target, piece in aligned(rows, self.take(rows.shape[1])):
            target.add_(piece)
        return rows


def aligned(rows: Tensor, pieces: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(part of `rows`, piece) for pieces that follow one another in `rows`."""
    start = 0
    for piece in pieces:
        end = start + piece.shape[1]
        yield rows[:, start:end], piece
        start = end


def sequential_rows(layers: Sequence[nn.Module]) -> ChainRows:
    """The stream of a plain sequence of convolutions and activations, nested or not."""
    streams: list[RowStream] = []
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            streams.append(sequential_rows(list(layer)))
        elif isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
            streams.append(ConvRows(layer))
        else:
            streams.append(PointwiseRows(layer))
    return ChainRows(*streams)


def push_whole(stream: RowStream, x: Tensor) -> Tensor:
    """(B, C, h, w) through a new stream at once: (B, C', h, w), channels-last in memory."""
    return stream.push(x.permute(0, 2, 3, 1).contiguous(), last=True).permute(0, 3, 1, 2)


class HaloRows:
    """Runs of rows through a network that takes images: what the borders of a run lack is kept.

    Rows near the border of two runs are computed for both, twice the radius for each run: for
    devices where a run is many times the radius.

    Args:
        network: (B, C, h, w) to (B, C', h, w); a row of its output depends on `radius` rows of the
            input above and below, and on zeros beyond the image in every layer.
        radius: in rows.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], radius: int) -> None:
        self._network = network
        self._radius = radius
        self._kept: Tensor | None = None
        # Of the kept rows, how many have their output already.
        self._done = 0

    def push(self, rows: Tensor, last: bool) -> Tensor:
        """See :class:`RowStream`: (B, r, w, C) to (B, r', w, C'); what the network raises."""
        if self._kept is not None:
            rows = torch.cat([self._kept, rows], dim=1)
        ready = rows.shape[1] - (0 if last else self._radius)
        if ready <= self._done:
            self._kept = rows
            return rows[:, :0]
        out = self._network(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        found = out[:, self._done : ready].contiguous()
        above = max(0, ready - self._radius)
        self._kept, self._done = rows[:, above:].clone(), ready - above
        return found
