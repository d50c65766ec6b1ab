"""One kernel for what runs per output pixel: gather, geometry, all layers, bilinear skip, store.

A program takes BLOCK pixels through a whole MLP: what it reads of them are the first layer's sums
at LR resolution, what it writes is the result, and between the two everything stays in registers.
A layer's units come in pieces (see `models.kernels.weights`), so a layer is a few products.

In fp32, products are computed in three parts of tf32, as exactly as in fp32: with the official
CARN weights both differ from float64 by 7e-8, one part of tf32 by 2e-4. Plain fp32 products would
not run on matrix units, and their operands do not fit into registers.

Axes: B batch, h w LR, H W output, O outputs, D (padded) hidden width, L LR pixels.
"""

# In Triton's language tuples grow by `+` only, and a variable takes the type that it is given.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.grid import PixelGrid
from models.kernels.partition import Partition
from models.kernels.weights import KernelMLP
from utils.errors import UserError

_MOST_PIXELS = 2**31 - 2**16

# Multiply-adds in one rounding, as ever, whatever a Triton's default. Loads that run ahead of
# products (num_stages) would take a copy of the weights.
COMPILER_OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Skip:
    """What a residual is added to, and in which unit it comes.

    Attributes:
        lr_B3hw: the whole LR image, float32, contiguous.
        std: (3,) float32, the residual's unit.
    """

    lr_B3hw: Tensor
    std: Tensor


@dataclass(frozen=True)
class ClassPixels:
    """The pixels to work on: those of one class."""

    partition: Partition
    index: int


def largest_piece(dtype: torch.dtype, device: torch.device, width: int) -> int | None:
    """The piece size for layers of `width` units (see `models.kernels.weights.Pieces`).

    It keeps a layer in registers. In fp32 an operand is split into two parts of tf32: Hopper's
    matrix units read the weights from shared memory; elsewhere they take registers, and 64 x 64 of
    them are too many.

    In half precision on Hopper, layers of several pieces with 64 units among them come out wrong
    (on an H200, Triton 3.6; in fp32 and in the interpreter they are right, other GPUs were not
    tried). There, pieces of 32 are right, and fast up to 128 units; wider layers are one piece.
    """
    is_cuda = device.type == "cuda"
    is_hopper = is_cuda and torch.cuda.get_device_capability(device)[0] == 9
    if dtype == torch.float32:
        return 32 if is_cuda and not is_hopper else 64
    if not is_hopper:
        return 64
    return 32 if width <= 128 else None


def launch_options(dtype: torch.dtype, width: int) -> dict[str, int]:
    """Pixels per program and warps for hidden layers of `width` units.

    Chosen by what `ptxas` reports for compute capability 8.0 and 9.0 at the published widths: no
    register is spilled up to CARN's 80 units, few are at SRResNet's 192, and else there are as
    many warps as possible. Others can be tried with `benchmarks/kernels.py --tune`.
    """
    if dtype == torch.float32:
        return {"BLOCK": 64, "num_warps": 4 if width <= 128 else 8}
    return {"BLOCK": 128 if width <= 128 else 64, "num_warps": 4 if width <= 32 else 8}


def apply_mlp(
    mlp: KernelMLP,
    feat_BChw: Tensor,
    grid: PixelGrid,
    out_BOHW: Tensor,
    *,
    only: ClassPixels | None = None,
    skip: Skip | None = None,
    options: Mapping[str, int] | None = None,
) -> None:
    """Write an MLP's outputs, at all pixels or at those of a class, into `out_BOHW`.

    Nothing waits for the device: where the number of pixels is known there only, as many programs
    are started as all pixels would need, and those that find nothing to do end at once.

    Args:
        feat_BChw: features, of the MLP's dtype; fastest where they are channels-last.
        out_BOHW: float32, contiguous.
        skip: where given, the outputs are residuals, which are scaled and added to the LR image's
            bilinear interpolation.
        options: other ones than :func:`launch_options`, to be tried.

    Raises:
        UserError: more pixels than an int32 counts.
    """
    batch, _, H, W = out_BOHW.shape
    total = batch * H * W
    if total > _MOST_PIXELS:
        raise UserError(f"{total} output pixels at once are too many: use smaller images")
    sums_LD = feat_BChw.permute(0, 2, 3, 1).flatten(0, 2) @ mlp.feature_CD
    if total == 0:
        return
    options = options or launch_options(sums_LD.dtype, mlp.hidden.width)
    programs = triton.cdiv(total, options["BLOCK"])
    rows, cols = grid.rows, grid.cols
    with torch.cuda.device_of(out_BOHW):
        pixel_mlp[(programs,)](
            out_BOHW,
            sums_LD,
            mlp.geometry_5D,
            mlp.weights,
            mlp.biases,
            *(None, None) if skip is None else (skip.lr_B3hw, skip.std),
            *(None, None) if only is None else (only.partition.pixels_Q, only.partition.bounds),
            0 if only is None else only.index,
            *(rows.nearest, rows.rel, rows.lower, rows.upper, rows.weight),
            *(cols.nearest, cols.rel, cols.lower, cols.upper, cols.weight),
            rows.cell,
            cols.cell,
            total,
            H,
            W,
            rows.lr_len,
            cols.lr_len,
            *(0, 0) if skip is None else skip.lr_B3hw.shape[2:],
            OUTPUTS=mlp.out_dim,
            LAYERS=mlp.layers,
            SIZES=mlp.hidden.sizes,
            STARTS=mlp.hidden.starts,
            OUT_SIZES=mlp.outputs.sizes,
            PRECISION="tf32x3" if sums_LD.dtype == torch.float32 else "ieee",
            **COMPILER_OPTIONS,
            **options,
        )


# Numbers and tables take too many forms, as grids are cut into parts, to compile for each.
@triton.jit(
    do_not_specialize=[
        *("class_index", "cell_y", "cell_x", "total", "H", "W", "h", "w", "image_h", "image_w"),
    ],
    do_not_specialize_on_alignment=[
        *("near_y_ptr", "rel_y_ptr", "lower_y_ptr", "upper_y_ptr", "weight_y_ptr"),
        *("near_x_ptr", "rel_x_ptr", "lower_x_ptr", "upper_x_ptr", "weight_x_ptr"),
    ],
)
def pixel_mlp(
    out_ptr,
    sums_ptr,
    geometry_ptr,
    weights_ptr,
    biases_ptr,
    lr_ptr,
    std_ptr,
    pixels_ptr,
    bounds_ptr,
    class_index,
    near_y_ptr,
    rel_y_ptr,
    lower_y_ptr,
    upper_y_ptr,
    weight_y_ptr,
    near_x_ptr,
    rel_x_ptr,
    lower_x_ptr,
    upper_x_ptr,
    weight_x_ptr,
    cell_y,
    cell_x,
    total,
    H,
    W,
    h,
    w,
    image_h,
    image_w,
    OUTPUTS: tl.constexpr,
    LAYERS: tl.constexpr,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    OUT_SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Arguments: see :func:`apply_mlp`. Without a list of pixels it is all of them; without an LR
    image nothing is added."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if pixels_ptr is None:
        pixel = tl.minimum(index, total - 1)
    else:
        start = tl.load(bounds_ptr + class_index)
        total = tl.load(bounds_ptr + class_index + 1) - start
        if tl.program_id(0) * BLOCK >= total:
            return
        # Beyond the end the last pixel is worked on again, but not written.
        pixel = tl.load(pixels_ptr + start + tl.minimum(index, total - 1))
    image = pixel // (H * W)
    place = pixel % (H * W)
    row = place // W
    col = place % W

    near_y = tl.load(near_y_ptr + row).to(tl.int32)
    near_x = tl.load(near_x_ptr + col).to(tl.int32)
    source = ((image * h + near_y) * w + near_x).to(tl.int64)
    rel_y = tl.load(rel_y_ptr + row)
    rel_x = tl.load(rel_x_ptr + col)
    y = _first_layer(sums_ptr, geometry_ptr, source, rel_y, rel_x, cell_y, cell_x, STARTS, SIZES)
    if LAYERS > 0:
        y = _other_layers(
            y, weights_ptr, biases_ptr, LAYERS, STARTS, SIZES, OUT_SIZES, BLOCK, PRECISION
        )

    is_written = index < total
    output = tl.arange(0, OUT_SIZES[0])
    if lr_ptr is not None:
        above = tl.load(lower_y_ptr + row).to(tl.int32) * image_w
        below = tl.load(upper_y_ptr + row).to(tl.int32) * image_w
        left = tl.load(lower_x_ptr + col).to(tl.int32)
        right = tl.load(upper_x_ptr + col).to(tl.int32)
        weight_y = tl.load(weight_y_ptr + row)
        weight_x = tl.load(weight_x_ptr + col)
    # Output by output: neighbouring pixels then lie side by side in registers as in memory.
    for k in tl.static_range(OUTPUTS):
        result = tl.sum(tl.where(output[None, :] == k, y[0], 0.0), 1)
        plane = (image * OUTPUTS + k).to(tl.int64)
        if lr_ptr is not None:
            plane_ptr = lr_ptr + plane * (image_h * image_w)
            high = _between(plane_ptr + above + left, plane_ptr + above + right, weight_x)
            low = _between(plane_ptr + below + left, plane_ptr + below + right, weight_x)
            result = result * tl.load(std_ptr + k) + high + (low - high) * weight_y
        tl.store(out_ptr + plane * (H * W) + place, result, mask=is_written)


@triton.jit
def _first_layer(
    sums_ptr,
    geometry_ptr,
    source,
    rel_y,
    rel_x,
    cell_y,
    cell_x,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
):
    """The first layer at each pixel, from the sums at its LR pixel and its place there."""
    WIDTH: tl.constexpr = STARTS[-1] + SIZES[-1]
    y = ()
    for n in tl.static_range(len(SIZES)):
        unit = STARTS[n] + tl.arange(0, SIZES[n])
        sums = tl.load(sums_ptr + source[:, None] * WIDTH + unit[None, :]).to(tl.float32)
        wy = tl.load(geometry_ptr + unit)
        wx = tl.load(geometry_ptr + WIDTH + unit)
        constant = tl.load(geometry_ptr + 4 * WIDTH + unit)
        constant += cell_y * tl.load(geometry_ptr + 2 * WIDTH + unit)
        constant += cell_x * tl.load(geometry_ptr + 3 * WIDTH + unit)
        sums += rel_y[:, None] * wy[None, :] + rel_x[:, None] * wx[None, :] + constant[None, :]
        y = y + (sums,)
    return y


@triton.jit
def _other_layers(
    y,
    weights_ptr,
    biases_ptr,
    LAYERS: tl.constexpr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    OUT_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All layers but the first, each on what the one before gives through a ReLU."""
    WIDTH: tl.constexpr = STARTS[-1] + SIZES[-1]
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    x = _relu(y, dtype)
    # Not unrolled: that would take registers, and several times as long to compile.
    for layer in range(LAYERS - 1):
        hidden_ptr = weights_ptr + layer * (WIDTH * WIDTH)
        bias_ptr = biases_ptr + layer * WIDTH
        y = _dense(x, hidden_ptr, bias_ptr, STARTS, SIZES, STARTS, SIZES, BLOCK, PRECISION)
        x = _relu(y, dtype)
    last_ptr = weights_ptr + (LAYERS - 1) * (WIDTH * WIDTH)
    bias_ptr = biases_ptr + (LAYERS - 1) * WIDTH
    return _dense(x, last_ptr, bias_ptr, STARTS, SIZES, (0,), OUT_SIZES, BLOCK, PRECISION)


@triton.jit
def _relu(y, dtype: tl.constexpr):
    x = ()
    for n in tl.static_range(len(y)):
        x = x + (tl.maximum(y[n], 0.0, propagate_nan=tl.PropagateNan.ALL).to(dtype),)
    return x


@triton.jit
def _dense(
    x,
    weights_ptr,
    biases_ptr,
    STARTS: tl.constexpr,
    SIZES: tl.constexpr,
    OUT_STARTS: tl.constexpr,
    OUT_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A linear layer from pieces (BLOCK, SIZES[k]) to pieces (BLOCK, OUT_SIZES[n]), float32."""
    STRIDE: tl.constexpr = OUT_STARTS[-1] + OUT_SIZES[-1]
    y = ()
    for n in tl.static_range(len(OUT_SIZES)):
        biases = tl.load(biases_ptr + OUT_STARTS[n] + tl.arange(0, OUT_SIZES[n]))
        y = y + (tl.zeros((BLOCK, 1), tl.float32) + biases[None, :],)
    # Input by input: once its products are done, a piece's registers are free.
    for k in tl.static_range(len(SIZES)):
        row = STARTS[k] + tl.arange(0, SIZES[k])
        sums = ()
        for n in tl.static_range(len(OUT_SIZES)):
            col = OUT_STARTS[n] + tl.arange(0, OUT_SIZES[n])
            weights = tl.load(weights_ptr + row[:, None] * STRIDE + col[None, :])
            sums = sums + (tl.dot(x[k], weights, y[n], input_precision=PRECISION),)
        y = sums
    return y


@triton.jit
def _between(first_ptr, second_ptr, weight):
    """Linear interpolation; `weight` is the second one's."""
    first = tl.load(first_ptr)
    return first + (tl.load(second_ptr) - first) * weight
