"""Backbones on a GPU: each step of their graph by one kernel, without a pass for bias, activation,
addition or concatenation.

Axes: B batch, C channels, h w LR, r rows.
"""

import torch
from torch import Tensor

from models.kernels.conv import MOST_ELEMENTS, KernelSum, apply_sum, padded_channels, split
from models.row_graph import RowGraph
from models.streams import HaloRows, RowStream
from utils.errors import UserError


class GraphEncoder:
    """A backbone's features by the fused kernels: a `models.streams.Encoder`.

    The first step is as exact as float32 in any case: rounding an image to bfloat16 costs more than
    all other rounding together. In float32, activations beyond 65504 are cut off.
    FLOPs are counted elsewhere as the network's: without zeros between groups, without padding, and
    once for rows that two runs share.

    Args:
        graph: what the backbone does, on a CUDA device.
        dtype: float32, bfloat16 or float16: of what is behind the first step.

    Raises:
        ValueError: the kernels are not made for the graph.
    """

    input_dtype = torch.float32

    def __init__(self, graph: RowGraph, dtype: torch.dtype = torch.float32) -> None:
        reads_image = [RowGraph.IMAGE in step.sources for step in graph.steps]
        if graph.steps[0].sources != (RowGraph.IMAGE,) or any(reads_image[1:]):
            raise ValueError("a graph whose image is read by another step than the first alone")
        self._graph = graph
        self._dtype = dtype
        self._sums = [
            KernelSum.pack(step, torch.float32 if index == 0 else dtype)
            for index, step in enumerate(graph.steps)
        ]
        self._last_uses = _last_uses(graph)
        self._radius = max(graph.lags(), default=0)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised (B, 3, h, w) to features (B, C, h, w), channels-last in memory.

        Raises:
            UserError: too many pixels at once.
        """
        batch, channels, h, w = x.shape
        widest = max(max(s.columns for s in self._sums), padded_channels(channels))
        if batch * h * w * widest > MOST_ELEMENTS:
            raise UserError(f"{batch * h * w} LR pixels at once are too many: use fewer")
        image = x.new_zeros(batch, h, w, padded_channels(channels), dtype=torch.float32)
        image[..., :channels] = x.permute(0, 2, 3, 1)
        outputs: dict[int, Tensor] = {RowGraph.IMAGE: split(image)}
        last = len(self._sums) - 1
        for index, (step, packed) in enumerate(zip(self._graph.steps, self._sums, strict=True)):
            if index == last:
                out = x.new_empty(batch, h, w, packed.out_channels, dtype=self._dtype)
            elif self._dtype == torch.float32:
                out = x.new_empty(2, batch, h, w, packed.columns, dtype=torch.float16)
            else:
                out = x.new_empty(batch, h, w, packed.columns, dtype=self._dtype)
            added = None if step.added is None else outputs[step.added]
            if out.numel():
                apply_sum(packed, [outputs[source] for source in step.sources], out, added)
            outputs[index] = out
            for done in self._last_uses[index]:
                del outputs[done]
        return outputs[last].permute(0, 3, 1, 2)

    def stream(self) -> RowStream | None:
        """A new stream of the same function, for one batch: runs of rows with a halo."""
        return HaloRows(self, self._radius)


def _last_uses(graph: RowGraph) -> list[list[int]]:
    """For each step, what no later one reads."""
    uses: dict[int, int] = {}
    for index, step in enumerate(graph.steps):
        for source in (*step.sources, *(() if step.added is None else (step.added,))):
            uses[source] = index
    return [[source for source, last in uses.items() if last == i] for i in range(len(graph.steps))]
