"""The compiled kernels as Python sees them: structures, weights in the order they are read, calls.

Axes: C channels, D width of the first layer, O outputs, h w LR, H W output, P terms.
"""

import ctypes
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.grid import GridAxis, PixelGrid
from models.sampler import LIIFSampler
from utils.errors import UserError

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
# Outputs of a pair of matrix tiles, and inputs of a tile.
_PAIR = 32
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
class NativeMLP:
    """A sampler's weights in the order that the kernels read them, float32.

    ``W1 [f; rel; cell] + b1 = Wf f + wy rel_y + wx rel_x + (Wc cell + b1)``; see `models.sampler`.

    Attributes:
        layers: (weights in tiles, bias) of each layer; the first is Wf and has no bias.
        widths: of the features, of each hidden layer, and O.
        geometry_4D: the columns of W1 for rel_y, rel_x, cell_y, cell_x.
        bias_D: b1.
        half_layers: (weights in pairs of matrix tiles, bfloat16, and bias, filled up) of each
            layer; None where it runs in float32.
    """

    layers: list[tuple[Tensor, Tensor | None]]
    widths: list[int]
    geometry_4D: Tensor
    bias_D: Tensor
    half_layers: list[tuple[Tensor, Tensor]] | None = None

    @classmethod
    def pack(
        cls, sampler: LIIFSampler, tile: int, *, margins: bool = False, half: bool = False
    ) -> "NativeMLP":
        """Pack a sampler's weights.

        Args:
            tile: the most outputs that are computed at once.
            margins: give each output relative to the first one, which is left out.
            half: to run in bfloat16, see `mlp_amx.h`; for MLPs of two layers or more and at most
                32 outputs.
        """
        pairs = [(layer.weight.detach(), layer.bias.detach()) for layer in sampler.imnet.linears]
        if margins:
            weight, bias = pairs[-1]
            pairs[-1] = weight[1:] - weight[:1], bias[1:] - bias[:1]
        (first, first_bias), *rest = [(w.float(), b.float()) for w, b in pairs]
        channels = sampler.in_dim
        layers: list[tuple[Tensor, Tensor | None]] = [(_in_tiles(first[:, :channels], tile), None)]
        layers += [(_in_tiles(weight, tile), bias.clone()) for weight, bias in rest]
        widths = [channels, len(first), *(len(weight) for weight, _ in rest)]
        geometry_4D = first[:, channels:].t().clone()
        half_layers = None
        if half and len(rest) > 0 and widths[-1] <= _PAIR:
            no_bias = torch.zeros(len(first))
            half_layers = [
                (_in_pairs(weight), _filled(bias))
                for weight, bias in [(first[:, :channels], no_bias), *rest]
            ]
        return cls(layers, widths, geometry_4D, first_bias.clone(), half_layers)

    @property
    def out_dim(self) -> int:
        """O, the number of outputs."""
        return self.widths[-1]

    def flops(self, lr_pixels: int, pixels: int) -> int:
        """Executed FLOPs: the first layer on LR pixels, the others on output pixels.

        Without those of lanes that fill a vector up: at most 31 pixels in a segment's last group.
        """
        first, *rest = (a * b for a, b in itertools.pairwise(self.widths))
        return 2 * (lr_pixels * first + pixels * sum(rest))

    def terms(self, grid: PixelGrid) -> tuple[Tensor, Tensor | None]:
        """What position adds to the first layer.

        Returns:
            at an integer scale (scale * scale, D), by phase, and None; else the columns' part
            (W, D) and the rows' (H, D), which holds the constant.
        """
        rel_y, rel_x, cell_y, cell_x = self.geometry_4D
        constant_D = self.bias_D + cell_y * grid.rows.cell + cell_x * grid.cols.cell
        rows_HD = grid.rows.rel[:, None] * rel_y + constant_D
        cols_WD = grid.cols.rel[:, None] * rel_x
        scale = grid.integer_scale
        if scale is None:
            return cols_WD, rows_HD
        phases_SSD = rows_HD[:scale, None] + cols_WD[None, :scale]
        return phases_SSD.flatten(0, 1), None


def _in_tiles(weight_OI: Tensor, tile: int) -> Tensor:
    """Rows in groups of about equal size, at most `tile`; of each group (inputs, rows)."""
    outputs = len(weight_OI)
    count = -(-outputs // tile)
    ends = [t * outputs // count for t in range(count + 1)]
    groups = [weight_OI[a:b].t().flatten() for a, b in itertools.pairwise(ends)]
    return torch.cat(groups)


def _filled(values: Tensor) -> Tensor:
    """The last axis with zeros up to a pair of matrix tiles."""
    return F.pad(values, (0, -values.shape[-1] % _PAIR)).contiguous()


def _in_pairs(weight_OI: Tensor) -> Tensor:
    """bfloat16, by pair of output tiles, 32 inputs, tile; of each (inputs / 2, outputs, 2)."""
    full_OI = _filled(_filled(weight_OI).t()).t()
    pairs = full_OI.reshape(-1, 2, _PAIR // 2, full_OI.shape[1] // _PAIR, _PAIR // 2, 2)
    return pairs.permute(0, 3, 1, 4, 2, 5).flatten().bfloat16()


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
        tile: the most outputs that are computed at once.
        group: pixels that fill the vectors.

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
            self.rows_tile = int(self._library.pcsr_rows_tile())
            self.rows_group = int(self._library.pcsr_rows_group())
            self.rows_margin = int(self._library.pcsr_rows_margin())
            self.rows_half_margin = int(self._library.pcsr_rows_half_margin())
            self.rows_has_half = bool(self._library.pcsr_rows_has_half())
            self._rows_work = self._library.pcsr_rows_work
            self._passes = {name: self._library[f"pcsr_{name}_work"] for name in _PASSES}
        except (OSError, AttributeError) as error:
            raise UserError(f"CPU kernels: {path} cannot be loaded ({error})") from error
        for work in (self._work, self._rows_work, *self._passes.values()):
            work.argtypes = (_POINTER,)
            work.restype = None
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
        check_tensor("feat_BChw", feat_BChw, torch.float32, (batch, channels, h, w), "any")
        check_tensor("out_BOHW", out_BOHW, torch.float32, (batch, outputs, H, W))
        if skip is not None:
            skip.check((batch, outputs), grid)
        keep: list[Tensor] = []

        def address(tensor: Tensor | None) -> int | None:
            if tensor is None:
                return None
            keep.append(tensor)
            return tensor.data_ptr()

        structures = (_Mlp * len(mlps))(*(_mlp(mlp, grid, self._lanes, address) for mlp in mlps))
        job = _Job(
            h=h,
            w=w,
            channels=channels,
            H=H,
            W=W,
            scale=grid.integer_scale or 0,
            row_stride=feat_BChw.stride(2),
            pixel_stride=feat_BChw.stride(3),
            channel_stride=feat_BChw.stride(1),
            first_out=address(_starts(grid.rows.nearest, torch.arange(h + 1))),
            nearest=address(grid.cols.nearest.int()),
            first_col=address(
                _starts(grid.cols.nearest, torch.arange(0, w + self._segment, self._segment))
            ),
            mlps=len(mlps),
            mlp=structures,
        )
        if skip is not None:
            job.gain = address(skip.gain_O)
            job.enlarged.row_stride = skip.lr_BOhw.stride(2)
            job.enlarged.channel_stride = skip.lr_BOhw.stride(1)
            job.enlarged.rows = _sides(grid.rows, address)
            job.enlarged.cols = _sides(grid.cols, address)
        tasks = h * -(-w // self._segment)
        for image in range(batch):
            job.feat, job.out = feat_BChw[image].data_ptr(), out_BOHW[image].data_ptr()
            if skip is not None:
                job.classes = skip.classes_BHW[image].data_ptr()
                job.enlarged.lr = skip.lr_BOhw[image].data_ptr()
            job.next = 0
            self._run(self._work, job, min(torch.get_num_threads(), tasks))
            if job.next < tasks:
                raise MemoryError("CPU kernels: not enough memory for a few rows")
        return 2 * int(job.macs)

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


def _sides(axis: GridAxis, address: Callable[[Tensor | None], int | None]) -> _Sides:
    return _Sides(address(axis.lower.int()), address(axis.upper.int()), address(axis.weight))


def _starts(nearest: Tensor, bounds: Tensor) -> Tensor:
    """(len(bounds),) int32: the first output pixel whose nearest LR pixel is at least a bound."""
    return torch.searchsorted(nearest, bounds, out_int32=True)


def _mlp(
    mlp: NativeMLP, grid: PixelGrid, lanes: int, address: Callable[[Tensor | None], int | None]
) -> _Mlp:
    def filled(table_PD: Tensor | None) -> int | None:
        """With rows of full vectors."""
        if table_PD is None:
            return None
        return address(F.pad(table_PD, (0, -table_PD.shape[1] % lanes)).contiguous())

    terms, rows = mlp.terms(grid)
    layers = (_Layer * len(mlp.layers))(
        *(
            _Layer(inputs, outputs, address(weight), address(bias))
            for (weight, bias), (inputs, outputs) in zip(
                mlp.layers, itertools.pairwise(mlp.widths), strict=True
            )
        )
    )
    half = None
    if mlp.half_layers is not None:
        half = ctypes.pointer(_half_mlp(mlp, terms, rows, address))
    return _Mlp(len(mlp.layers), layers, filled(terms), filled(rows), half)


def _half_mlp(
    mlp: NativeMLP,
    terms: Tensor,
    rows: Tensor | None,
    address: Callable[[Tensor | None], int | None],
) -> _HalfMlp:
    assert mlp.half_layers is not None
    widths = [width + -width % _PAIR for width in mlp.widths]
    layers = (_Layer * len(mlp.half_layers))(
        *(
            _Layer(inputs, outputs, address(weight), address(bias))
            for (weight, bias), (inputs, outputs) in zip(
                mlp.half_layers, itertools.pairwise(widths), strict=True
            )
        )
    )
    filled_rows = None if rows is None else _filled(rows)
    return _HalfMlp(len(layers), layers, address(_filled(terms)), address(filled_rows))
