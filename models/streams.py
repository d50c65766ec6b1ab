"""Networks as streams of rows: exact, in memory that does not grow with the image's height.

A stream takes an image's rows from top to bottom in runs of any length and gives its output rows
as soon as they are determined. Convolutions keep the few input rows that the next run needs, so
nothing is computed twice (tiles with a halo would compute a fifth again) and the result is that of
the whole image.

Rows are (B, r, w, C), contiguous: channels-last convolutions read them as they are.
"""

from collections.abc import Callable, Sequence
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

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, h, w) to features (B, C, h, w)."""
        ...

    def stream(self) -> RowStream | None:
        """A new stream of the same function, for one batch; None where there is none."""
        ...


class ConvRows:
    """A convolution of odd kernel size, stride 1 and zero padding that keeps the size.

    Args:
        conv: its weights are read, not copied where they are channels-last already.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self._bias = None if conv.bias is None else conv.bias.detach()
        self._radius = conv.kernel_size[0] // 2
        self._groups = conv.groups
        self._kept: Tensor | None = None

    def push(self, rows: Tensor, last: bool) -> Tensor:
        if self._kept is None and last:
            return self._convolve(rows, self._radius)
        padding = rows.new_zeros(len(rows), self._radius, *rows.shape[2:])
        parts = [padding if self._kept is None else self._kept, rows]
        rows = torch.cat([*parts, padding] if last else parts, dim=1)
        ready = rows.shape[1] - 2 * self._radius
        self._kept = rows[:, max(0, ready) :]
        return self._convolve(rows, 0) if ready > 0 else rows[:, :0]

    def _convolve(self, rows: Tensor, padding_rows: int) -> Tensor:
        x = rows.permute(0, 3, 1, 2)
        padding = (padding_rows, self._radius)
        y = F.conv2d(x, self._weight, self._bias, padding=padding, groups=self._groups)
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
        out = self._body.push(rows, last)
        ready = out.shape[1]
        return out.add_(self._waiting.take(ready)) if ready else out


class RowQueue:
    """Rows that wait for those of a stream that lags behind."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def put(self, rows: Tensor) -> None:
        """Add rows at the end."""
        self._parts.append(rows)

    def take(self, count: int) -> Tensor:
        """Remove the first `count` rows; there are as many."""
        rows = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts, dim=1)
        self._parts = [rows[:, count:]]
        return rows[:, :count]


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
