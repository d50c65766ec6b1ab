"""The compiled kernels as Python sees them: structures and calls.

Axes: C channels, O outputs, h w LR, H W output.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.grid import GridAxis, PixelGrid
from models.native.mlp import PAIR, NativeMLP
from utils.errors import UserError

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_PASSES = ("refine", "histogram")


class _Layer(ctypes.Structure):
    _fields_ = (("inputs", _INT), ("outputs", _INT), ("weight", _POINTER), ("bias", _POINTER))


class _HalfMlp(ctypes.Structure):
    _fields_ = (
        ("layers", _INT),
        *(("layer", ctypes.POINTER(_Layer)), ("terms", _POINTER), ("rows", _POINTER)),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (
        *(("layers", _INT), ("layer", ctypes.POINTER(_Layer))),
        *(("terms", _POINTER), ("rows", _POINTER)),
        ("half", ctypes.POINTER(_HalfMlp)),
    )


class _Sides(ctypes.Structure):
    _fields_ = (("lower", _POINTER), ("upper", _POINTER), ("weight", _POINTER))

    @classmethod
    def of(cls, axis: GridAxis) -> "_Sides":
        """Of an axis, whose tables it keeps."""
        lower, upper = (side.numpy().astype(np.int32) for side in (axis.lower, axis.upper))
        sides = cls(lower.ctypes.data, upper.ctypes.data, axis.weight.data_ptr())
        sides.kept = lower, upper, axis.weight
        return sides


class _Bilinear(ctypes.Structure):
    _fields_ = (
        *(("lr", _POINTER), ("row_stride", _LONG), ("channel_stride", _LONG)),
        *(("rows", _Sides), ("cols", _Sides)),
    )


class _Job(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("h", "w", "channels", "H", "W", "scale")),
        ("feat", _POINTER),
        *((name, _LONG) for name in ("row_stride", "pixel_stride", "channel_stride")),
        *((name, _POINTER) for name in ("first_out", "nearest", "first_col")),
        *(("mlps", _INT), ("mlp", ctypes.POINTER(_Mlp))),
        *((name, _POINTER) for name in ("classes", "out", "gain")),
        ("enlarged", _Bilinear),
        *(("next", _LONG), ("macs", _LONG)),
    )


@dataclass(frozen=True)
class Skip:
    """What upsamplers compute beyond a classifier: ``bilinear(lr) + gain * mlp_of_class``.

    Attributes:
        lr_BOhw: float32, the *whole* LR image, contiguous.
        classes_BHW: uint8: each pixel's MLP.
        gain_O: float32.
    """

    lr_BOhw: Tensor
    classes_BHW: Tensor
    gain_O: Tensor

    def check(self, batch_outputs: tuple[int, int], grid: PixelGrid) -> None:
        """Raises ValueError where a tensor is not what the kernels read on this grid."""
        batch, outputs = batch_outputs
        height = max(self.lr_BOhw.shape[2], grid.rows.span[1] + 1)
        shape = (batch, outputs, height, grid.cols.lr_len)
        check_tensor("lr_BOhw", self.lr_BOhw, torch.float32, shape)
        check_tensor("classes_BHW", self.classes_BHW, torch.uint8, (batch, *grid.out_size))
        check_tensor("gain_O", self.gain_O, torch.float32, (outputs,))


class Library:
    """The compiled kernels. It holds addresses, and so cannot be copied or pickled.

    Args:
        path: see `models.native.compiler`.

    Attributes:
        tile: the most outputs that are computed at once in float32.
        group: pixels that fill the vectors.
        margin: columns of zeros beside a row of float32; no kernel's radius is greater.
        half_margin: the same in half precision.
        has_half: the processor has a matrix unit, and the system lets this process use it.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self.tile = int(self._library.pcsr_tile())
            self.group = int(self._library.pcsr_group())
            self._lanes = int(self._library.pcsr_lanes())
            self._segment = int(self._library.pcsr_segment())
            self._work = self._library.pcsr_work
            self.margin = int(self._library.pcsr_rows_margin())
            self.half_margin = int(self._library.pcsr_rows_half_margin())
            self.has_half = bool(self._library.pcsr_rows_has_half())
            self._rows_work = self._library.pcsr_rows_work
            self._passes = {name: self._library[f"pcsr_{name}_work"] for name in _PASSES}
        except (OSError, AttributeError) as error:
            raise UserError(f"CPU kernels: {path} cannot be loaded ({error})") from error
        for work in (self._work, self._rows_work, *self._passes.values()):
            work.argtypes = (_POINTER,)
            work.restype = None
        self._columns: _Columns | None = None
        # The threads that torch uses, too: others would have to share the cores with these, which
        # go on waiting for work for a while.
        self._parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)

    def apply(
        self,
        mlps: Sequence[NativeMLP],
        feat_BChw: Tensor,
        grid: PixelGrid,
        out_BOHW: Tensor,
        *,
        skip: Skip | None = None,
    ) -> int:
        """Every output pixel through an MLP; returns the executed FLOPs.

        Args:
            mlps: one, or with `skip` one per class.
            feat_BChw: float32, in any order of memory.
            grid: of these LR rows.
            out_BOHW: float32; overwritten.
            skip: which MLP each pixel goes through, and what its result is added to.

        Raises:
            ValueError: tensors of other shapes, types or devices than these, or not contiguous.
            MemoryError: there is not enough for a few rows.
        """
        (h, w), (H, W) = (grid.rows.lr_len, grid.cols.lr_len), grid.out_size
        batch, channels, outputs = len(feat_BChw), mlps[0].widths[0], mlps[0].out_dim
        if {(mlp.widths[0], mlp.out_dim) for mlp in mlps} != {(channels, outputs)}:
            raise ValueError("CPU kernels: MLPs of different inputs or outputs")
        check_tensor("feat_BChw", feat_BChw, torch.float32, (batch, channels, h, w), "any")
        check_tensor("out_BOHW", out_BOHW, torch.float32, (batch, outputs, H, W))
        if skip is not None:
            skip.check((batch, outputs), grid)
        job = self._job(mlps, feat_BChw, grid, skip)
        tasks = h * -(-w // self._segment)
        for image in range(batch):
            job.feat, job.out = _address(feat_BChw, image), _address(out_BOHW, image)
            if skip is not None:
                job.classes = _address(skip.classes_BHW, image)
                job.enlarged.lr = _address(skip.lr_BOhw, image)
            job.next = 0
            self._run(self._work, job, min(torch.get_num_threads(), tasks))
            if job.next < tasks:
                raise MemoryError("CPU kernels: not enough memory for a few rows")
        return 2 * int(job.macs)

    def _job(
        self, mlps: Sequence[NativeMLP], feat_BChw: Tensor, grid: PixelGrid, skip: Skip | None
    ) -> _Job:
        """What is common to all images of a batch; it keeps the tables whose addresses it holds."""
        (h, w), (H, W) = (grid.rows.lr_len, grid.cols.lr_len), grid.out_size
        columns = self._columns
        if columns is None or columns.axis is not grid.cols:
            self._columns = columns = _Columns(grid.cols, self._segment)
        tables = [mlp.tables(grid, PAIR if mlp.half_layers else self._lanes) for mlp in mlps]
        structures = (_Mlp * len(mlps))(
            *(_mlp(mlp, *of_mlp) for mlp, of_mlp in zip(mlps, tables, strict=True))
        )
        first_out = np.searchsorted(grid.rows.nearest.numpy(), np.arange(h + 1)).astype(np.int32)
        job = _Job(
            h=h,
            w=w,
            channels=feat_BChw.shape[1],
            H=H,
            W=W,
            scale=grid.integer_scale or 0,
            row_stride=feat_BChw.stride(2),
            pixel_stride=feat_BChw.stride(3),
            channel_stride=feat_BChw.stride(1),
            first_out=first_out.ctypes.data,
            nearest=columns.nearest.ctypes.data,
            first_col=columns.first.ctypes.data,
            mlps=len(mlps),
            mlp=structures,
        )
        job.kept = [tables, first_out, columns]
        if skip is not None:
            rows = _Sides.of(grid.rows)
            job.kept.append(rows)
            job.gain = skip.gain_O.data_ptr()
            job.enlarged.row_stride = skip.lr_BOhw.stride(2)
            job.enlarged.channel_stride = skip.lr_BOhw.stride(1)
            job.enlarged.rows, job.enlarged.cols = rows, columns.sides
        return job

    def run_rows(self, run: ctypes.Structure) -> None:
        """Rows through a network, see `models.native.rows`."""
        self._run(self._rows_work, run, torch.get_num_threads())

    def run(self, name: str, job: ctypes.Structure, tasks: int) -> None:
        """One of the passes, see `models.native.passes`, on as many threads as there are tasks."""
        self._run(self._passes[name], job, min(torch.get_num_threads(), tasks))

    def _run(self, work: Callable[[Any], None], job: ctypes.Structure, threads: int) -> None:
        pointer = ctypes.byref(job)
        if threads <= 1:
            work(pointer)
        elif self._parallel is not None:
            function = ctypes.cast(work, _POINTER)  # type: ignore[arg-type]
            self._parallel(function, pointer, ctypes.c_uint(threads), ctypes.c_uint(0))
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda _: work(pointer), range(threads)))


def check_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    order: Literal["contiguous", "rows", "any"] = "contiguous",
) -> None:
    """The kernels read and write what they are told to, whatever is there.

    Args:
        order: of memory that the kernel needs; "rows": the columns of a row beside one another.

    Raises:
        ValueError: a tensor of another shape, type, device or order.
    """
    found = (tensor.dtype, tuple(tensor.shape), tensor.device.type)
    in_order = (
        order == "any"
        or tensor.is_contiguous()
        or (order == "rows" and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))
    )
    if found != (dtype, shape, "cpu") or not in_order:
        raise ValueError(f"CPU kernels: {name} is {found}, not {order} {(dtype, shape, 'cpu')}")


def _address(tensor: Tensor, image: int) -> int:
    return tensor.data_ptr() + image * tensor.stride(0) * tensor.element_size()


class _Columns:
    """The tables of an axis of columns, which all runs of an image's rows share."""

    def __init__(self, axis: GridAxis, segment: int) -> None:
        self.axis = axis
        nearest = axis.nearest.numpy()
        bounds = np.arange(0, axis.lr_len + segment, segment)
        self.nearest = nearest.astype(np.int32)
        self.first = np.searchsorted(nearest, bounds).astype(np.int32)
        self.sides = _Sides.of(axis)


def _mlp(mlp: NativeMLP, terms: Tensor, rows: Tensor | None) -> _Mlp:
    layers = (_Layer * len(mlp.layers))(
        *(
            _Layer(inputs, outputs, weight.data_ptr(), None if bias is None else bias.data_ptr())
            for (weight, bias), (inputs, outputs) in zip(
                mlp.layers, itertools.pairwise(mlp.widths), strict=True
            )
        )
    )
    half = None
    if mlp.half_layers is not None:
        half = ctypes.pointer(_half_mlp(mlp, terms, rows))
    return _Mlp(len(layers), layers, terms.data_ptr(), _optional(rows), half)


def _half_mlp(mlp: NativeMLP, terms: Tensor, rows: Tensor | None) -> _HalfMlp:
    assert mlp.half_layers is not None
    widths = [width + -width % PAIR for width in mlp.widths]
    layers = (_Layer * len(mlp.half_layers))(
        *(
            _Layer(inputs, outputs, weight.data_ptr(), bias.data_ptr())
            for (weight, bias), (inputs, outputs) in zip(
                mlp.half_layers, itertools.pairwise(widths), strict=True
            )
        )
    )
    return _HalfMlp(len(layers), layers, terms.data_ptr(), _optional(rows))


def _optional(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
