"""One kernel for one step of a backbone: a sum of convolutions, bias, addition and activation.

A program computes all channels of BLOCK pixels, as matrix products: of each source and each tap of
its kernel, BLOCK pixels by channels with channels by outputs. Activations are (B, h, w, C) with
channels padded to a power of two, so that a pixel is whole lines of the cache.

Groups of channels are one product with zeros in the weights: matrix units are no faster with a
group of 13 channels than with 64.

In float32 numbers are two parts of float16, the second scaled, which together hold 22 bits; and of
the four products of parts three are taken (Ootomo and Yokota, "Recovering single precision accuracy
from Tensor Cores while surpassing the FP32 theoretical peak performance", 2022). Activations are
stored as these parts: matrix units then read them as they are, where parts of tf32 would have to be
made in registers of every tap (measured on an H200: 1.1 ms instead of 0.25 for a layer).

Axes: B batch, C channels, N outputs, h w LR.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.row_graph import Sum

# Matrix units take no smaller sides.
_SMALLEST = 16
MOST_SOURCES = 4
# Of the second parts.
_SCALE = 2048.0
_LARGEST_HALF = 65504.0
# Places in memory are counted in 32 bits.
MOST_ELEMENTS = 2**31 - 2**20


def padded_channels(channels: int) -> int:
    """The power of two, and at least 16, that `channels` take in memory."""
    return max(_SMALLEST, 1 << (channels - 1).bit_length())


@dataclass(frozen=True)
class KernelSum:
    """A step's weights as the kernel reads them.

    Attributes:
        weights: (parts, K, N): rows are source by source, tap by tap, channel by channel, padded
            with zeros. Two parts where the sources are in parts, else one.
        bias_N, slope_N: float32.
        channels: padded, of each source.
        side: of the kernel.
        out_channels: without padding.
    """

    weights: Tensor
    bias_N: Tensor
    slope_N: Tensor
    channels: tuple[int, ...]
    side: int
    out_channels: int

    @classmethod
    def pack(cls, step: Sum, dtype: torch.dtype) -> "KernelSum":
        """Pack a step's weights for sources of `dtype`; float32 is in parts.

        Raises:
            ValueError: the kernel is not made for it: more than four sources, several sizes of
                kernels, or weights that float16 does not hold.
        """
        sides = {weight.shape[-1] for weight in step.weights}
        if len(step.weights) > MOST_SOURCES or len(sides) > 1:
            raise ValueError("a step of too many sources, or of kernels of several sizes")
        out_channels = len(step.bias_C)
        columns = padded_channels(out_channels)
        parts = [_rows(_dense(weight, step.groups), columns) for weight in step.weights]
        weights = torch.cat(parts)
        if dtype == torch.float32 and not weights.abs().max() < _LARGEST_HALF:
            raise ValueError("weights that float16 does not hold")
        return cls(
            weights=split(weights) if dtype == torch.float32 else weights[None].to(dtype),
            bias_N=_filled(step.bias_C, columns),
            slope_N=_filled(step.slope_C, columns),
            channels=tuple(padded_channels(_inputs(w, step.groups)) for w in step.weights),
            side=sides.pop(),
            out_channels=out_channels,
        )

    @property
    def columns(self) -> int:
        """N, padded."""
        return self.weights.shape[-1]

    @property
    def takes_parts(self) -> bool:
        """Whether sources are float32, in parts."""
        return len(self.weights) == 2


def split(x: Tensor) -> Tensor:
    """(...) float32 to (2, ...) float16: what it holds of `x`, and the rest times 2048."""
    high = x.clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
    rest = ((x - high.float()) * _SCALE).clamp(-_LARGEST_HALF, _LARGEST_HALF)
    return torch.stack([high, rest.half()])


def _inputs(weight: Tensor, groups: int) -> int:
    return weight.shape[1] * groups


def _dense(weight: Tensor, groups: int) -> Tensor:
    """(N, C / groups, k, k) to (N, C, k, k), zero between groups."""
    if groups == 1:
        return weight
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    dense = weight.new_zeros(weight.shape[0], inputs * groups, *weight.shape[2:])
    for group, part in enumerate(weight.split(outputs)):
        first = group * inputs
        dense[group * outputs : (group + 1) * outputs, first : first + inputs] = part
    return dense


def _rows(weight: Tensor, columns: int) -> Tensor:
    """(N, C, k, k) to (k k C, N), both padded."""
    outputs, inputs, side, _ = weight.shape
    rows = weight.new_zeros(side, side, padded_channels(inputs), columns)
    rows[:, :, :inputs, :outputs] = weight.permute(2, 3, 1, 0)
    return rows.flatten(0, 2)


def _filled(vector: Tensor, columns: int) -> Tensor:
    filled = vector.new_zeros(columns)
    filled[: len(vector)] = vector
    return filled


def launch_options(in_parts: bool, widest: int) -> dict[str, int]:
    """Pixels per program, warps, and how many loads run ahead of the products.

    Args:
        in_parts: the sources are.
        widest: of the sources' and the outputs' channels. Beyond 64, shared memory holds no loads
            that run ahead.
    """
    ahead = 2 if in_parts else 3
    return {"BLOCK": 128, "num_warps": 8, "num_stages": ahead if widest <= 64 else 1}


def apply_sum(
    packed: KernelSum,
    sources: Sequence[Tensor],
    out: Tensor,
    added: Tensor | None = None,
    options: dict[str, int] | None = None,
) -> None:
    """Write a step's output.

    Tensors are (B, h, w, C), or (2, B, h, w, C) in parts, contiguous.

    Args:
        sources: of the padded channels, and of the weights' kind.
        out: in parts or not, of any dtype, and of as many channels as are wanted: with padding,
            which becomes zero, or without.
        added: of the outputs' padded channels, in parts or not; or None.
        options: other ones than :func:`launch_options`, to be tried.
    """
    batch, h, w, out_columns = out.shape[-4:]
    total = batch * h * w
    widest = max(*packed.channels, packed.columns)
    options = options or launch_options(packed.takes_parts, widest)
    with torch.cuda.device_of(out):
        conv_sum[(triton.cdiv(total, options["BLOCK"]),)](
            out,
            *sources,
            *[None] * (MOST_SOURCES - len(sources)),
            packed.weights,
            packed.bias_N,
            packed.slope_N,
            added,
            h,
            w,
            total,
            CHANNELS=packed.channels,
            SIDE=packed.side,
            COLUMNS=packed.columns,
            OUT_COLUMNS=out_columns,
            IN_PARTS=packed.takes_parts,
            ADDED_IN_PARTS=added is not None and added.dim() == 5,
            OUT_IN_PARTS=out.dim() == 5,
            SCALE=_SCALE,
            LARGEST=_LARGEST_HALF,
            enable_fp_fusion=True,
            **options,
        )


@triton.jit(do_not_specialize=["h", "w", "total"])
def conv_sum(
    out_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    fourth_ptr,
    weights_ptr,
    bias_ptr,
    slope_ptr,
    added_ptr,
    h,
    w,
    total,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_COLUMNS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ADDED_IN_PARTS: tl.constexpr,
    OUT_IN_PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Arguments: see :func:`apply_sum`."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = pixel < total
    place = pixel % (h * w)
    row = place // w
    col = place % w
    output = tl.arange(0, COLUMNS)
    sums = tl.zeros((BLOCK, COLUMNS), tl.float32) + tl.load(bias_ptr + output)[None, :]
    rest = tl.zeros((BLOCK, COLUMNS), tl.float32)
    SHARE: tl.constexpr = SIDE * SIDE * COLUMNS
    low_weights_ptr = weights_ptr
    for index in tl.static_range(len(CHANNELS)):
        low_weights_ptr += CHANNELS[index] * SHARE
    for index in tl.static_range(len(CHANNELS)):
        if index == 0:
            source_ptr = first_ptr
        elif index == 1:
            source_ptr = second_ptr
        elif index == 2:
            source_ptr = third_ptr
        else:
            source_ptr = fourth_ptr
        low_ptr = source_ptr + total.to(tl.int64) * CHANNELS[index]
        sums, rest = _products(
            sums,
            rest,
            source_ptr,
            low_ptr,
            weights_ptr,
            low_weights_ptr,
            pixel,
            row,
            col,
            is_inside,
            h,
            w,
            CHANNELS[index],
            SIDE,
            COLUMNS,
            IN_PARTS,
        )
        weights_ptr += CHANNELS[index] * SHARE
        low_weights_ptr += CHANNELS[index] * SHARE
    if IN_PARTS:
        sums += rest / SCALE
    is_inside = is_inside[:, None]
    if added_ptr is not None:
        at = pixel[:, None] * COLUMNS + output[None, :]
        sums = _with_added(sums, added_ptr, at, total, COLUMNS, is_inside, ADDED_IN_PARTS, SCALE)
    sums = tl.where(sums < 0, sums * tl.load(slope_ptr + output)[None, :], sums)
    at = pixel[:, None] * OUT_COLUMNS + output[None, :]
    is_written = is_inside & (output < OUT_COLUMNS)[None, :]
    _store(out_ptr, at, sums, total, OUT_COLUMNS, is_written, OUT_IN_PARTS, SCALE, LARGEST)


@triton.jit
def _products(
    sums,
    rest,
    source_ptr,
    low_ptr,
    weights_ptr,
    low_weights_ptr,
    pixel,
    row,
    col,
    is_inside,
    h,
    w,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    IN_PARTS: tl.constexpr,
):
    """`sums` and `rest` with one source's products, tap by tap."""
    channel = tl.arange(0, CHANNELS)
    output = tl.arange(0, COLUMNS)
    # Not unrolled: loads then run ahead of products.
    for tap in range(SIDE * SIDE):
        down = tap // SIDE - SIDE // 2
        right = tap % SIDE - SIDE // 2
        is_there = is_inside & (row + down >= 0) & (row + down < h)
        is_there = is_there & (col + right >= 0) & (col + right < w)
        source = (pixel + down * w + right) * CHANNELS
        source = source[:, None] + channel[None, :]
        x = tl.load(source_ptr + source, mask=is_there[:, None], other=0.0)
        at = (tap * CHANNELS + channel[:, None]) * COLUMNS + output[None, :]
        weights = tl.load(weights_ptr + at)
        sums = tl.dot(x, weights, sums)
        if IN_PARTS:
            low = tl.load(low_ptr + source, mask=is_there[:, None], other=0.0)
            rest = tl.dot(low, weights, rest)
            rest = tl.dot(x, tl.load(low_weights_ptr + at), rest)
    return sums, rest


@triton.jit
def _with_added(
    sums,
    ptr,
    at,
    total,
    COLUMNS: tl.constexpr,
    is_inside,
    IN_PARTS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """`sums` and other activations, in parts or not."""
    sums += tl.load(ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    if IN_PARTS:
        low_ptr = ptr + total.to(tl.int64) * COLUMNS
        sums += tl.load(low_ptr + at, mask=is_inside, other=0.0).to(tl.float32) / SCALE
    return sums


@triton.jit
def _store(
    ptr,
    at,
    values,
    total,
    COLUMNS: tl.constexpr,
    is_written,
    IN_PARTS: tl.constexpr,
    SCALE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write float32 values, in parts (see :func:`split`) or not."""
    if IN_PARTS:
        high = tl.clamp(values, -LARGEST, LARGEST).to(tl.float16)
        tl.store(ptr + at, high, mask=is_written)
        low = tl.clamp((values - high.to(tl.float32)) * SCALE, -LARGEST, LARGEST).to(tl.float16)
        tl.store(ptr + total.to(tl.int64) * COLUMNS + at, low, mask=is_written)
    else:
        tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=is_written)
