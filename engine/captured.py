"""A training step as a CUDA graph: queued as a whole, so that small kernels do not wait for Python.

No compiler is involved: the first steps run as they always do, then one is recorded, which takes
about as long as a step, and from then on the recording is played on new samples. A step of CARN is
a thousand kernels of a few microseconds each, and Python takes longer than that to start one.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from models.grid import PixelGrid
from utils.cli import one_line
from utils.errors import UserError

# What a step computes: losses by name, and the gradient of each parameter.
Step = tuple[dict[str, Tensor], list[Tensor | None]]
Compute = Callable[[Tensor, Tensor], Step]
_Key = tuple[torch.Size, torch.Size]

# Steps of a size before it is recorded: in the first, libraries choose and load their kernels.
_WARM_UPS = 3
# A recording keeps its memory for good; with more sizes than these, the others are not recorded.
_MOST_GRAPHS = 8


class CapturedStep:
    """Calls `compute`, for each size of samples by a CUDA graph after the first few times.

    Args:
        compute: takes (lr, hr) on a CUDA device, returns losses and gradients. Its kernels must
            not depend on what the samples show, and it must not wait for the device.
    """

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._seen: Counter[_Key] = Counter()
        self._graphs: dict[_Key, _Graph] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, lr: Tensor, hr: Tensor) -> Step:
        """`compute(lr, hr)`; the gradients are valid until the next call.

        Raises:
            UserError: the step cannot be recorded. PyTorch's allocator may be of no use after it.
        """
        key = lr.shape, hr.shape
        graph = self._graphs.get(key)
        if graph is None and self._is_due(key):
            graph = self._graphs[key] = self._recorded(lr, hr)
        if graph is not None:
            return graph(lr, hr)
        self._seen[key] += 1
        return self._on_another_stream(lr, hr)

    def _is_due(self, key: _Key) -> bool:
        return self._seen[key] >= _WARM_UPS and len(self._graphs) < _MOST_GRAPHS

    def _recorded(self, lr: Tensor, hr: Tensor) -> "_Graph":
        try:
            return _Graph(self._compute, lr, hr)
        except RuntimeError as error:
            # What ends a recording says only that something went wrong in it before.
            reason = one_line(error.__context__ or error)
            raise UserError(
                f"config: `compile: capture` cannot record this training step ({reason}): leave "
                f"`compile` out"
            ) from error

    def _on_another_stream(self, lr: Tensor, hr: Tensor) -> Step:
        """As recording does: what autograd remembers of a stream is then the same."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(lr.device)
        here = torch.cuda.current_stream(lr.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = self._compute(lr, hr)
        here.wait_stream(self._stream)
        return found


class _Graph:
    """A recorded step, and the tensors that it reads and writes."""

    def __init__(self, compute: Compute, lr: Tensor, hr: Tensor) -> None:
        self._lr, self._hr = torch.empty_like(lr), torch.empty_like(hr)
        # Kept alive: the models' own copies of its tables come and go.
        self._grid = PixelGrid.build(
            (lr.shape[-2], lr.shape[-1]), (hr.shape[-2], hr.shape[-1]), lr.device
        )
        self._graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            self._graph,
            # By default, that of the device that was the first to record.
            stream=torch.cuda.Stream(lr.device),
            # Of this thread alone: another one may be pinning the next batches.
            capture_error_mode="thread_local",
        )
        with torch.cuda.device(lr.device), recording:
            self._losses, self._grads = compute(self._lr, self._hr)

    def __call__(self, lr: Tensor, hr: Tensor) -> Step:
        self._lr.copy_(lr)
        self._hr.copy_(hr)
        self._graph.replay()
        return {name: value.clone() for name, value in self._losses.items()}, self._grads
