"""Compiled passes over an image's pixels: what is beside the networks, and takes no product.

Axes: B batch, C channels, H W output.
"""

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models.native.bindings import Library, check_tensor

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Piece(ctypes.Structure):
    _fields_ = (
        ("prediction", _POINTER),
        *((name, _LONG) for name in ("image_stride", "channel_stride", "row_stride")),
        ("classes", _POINTER),
        *((name, _LONG) for name in ("class_image_stride", "class_row_stride", "rows")),
    )


class _Refinement(ctypes.Structure):
    _fields_ = (
        *((name, _INT) for name in ("images", "channels", "W", "first", "last")),
        ("piece", _Piece * 2),
        ("out", _POINTER),
        *((name, _LONG) for name in ("out_image_stride", "out_channel_stride")),
        *((name, _LONG) for name in ("out_row_stride", "next")),
    )


class _Histogram(ctypes.Structure):
    _fields_ = (
        *(("score", _POINTER), ("scores", _LONG), ("bins", _INT), ("tables", _INT)),
        *(("bin", _POINTER), ("next", _LONG), ("threads", _INT)),
    )


def refine_rows(
    library: Library, pieces: Sequence[tuple[Tensor, Tensor]], first: int, out_BCrW: Tensor
) -> None:
    """Refine rows `first` to first + r of an image that comes in pieces, see `models.refinement`.

    Args:
        pieces: one or two of (prediction (B, C, rows, W) float32, classes (B, rows, W) uint8), one
            under the other. What is above the first row and under the last is not averaged.
        out_BCrW: float32; overwritten. It shares no memory with the pieces.

    Raises:
        ValueError: tensors of other shapes, types or devices than these, or columns apart.
    """
    images, channels, rows, width = out_BCrW.shape
    height = sum(prediction.shape[2] for prediction, _ in pieces)
    check_tensor("out_BCrW", out_BCrW, torch.float32, (images, channels, rows, width), "rows")
    if not 0 <= first <= first + rows <= height or len(pieces) > 2:
        raise ValueError(f"CPU kernels: rows {first} to {first + rows} of {height} in pieces")
    structures = (_Piece * 2)()
    for structure, (prediction, classes) in zip(structures, pieces, strict=False):
        of_piece = prediction.shape[2]
        shape = (images, channels, of_piece, width)
        check_tensor("prediction_BCHW", prediction, torch.float32, shape, "rows")
        check_tensor("classes_BHW", classes, torch.uint8, (images, of_piece, width), "rows")
        structure.prediction, structure.classes = prediction.data_ptr(), classes.data_ptr()
        structure.image_stride, structure.channel_stride = prediction.stride()[:2]
        structure.row_stride = prediction.stride(2)
        structure.class_image_stride, structure.class_row_stride = classes.stride()[:2]
        structure.rows = of_piece
    job = _Refinement(
        images=images,
        channels=channels,
        W=width,
        first=first,
        last=first + rows,
        piece=structures,
        out=out_BCrW.data_ptr(),
        out_image_stride=out_BCrW.stride(0),
        out_channel_stride=out_BCrW.stride(1),
        out_row_stride=out_BCrW.stride(2),
    )
    if out_BCrW.numel():
        library.run("refine", job, images * rows)


def histogram(library: Library, chunks: Iterable[Tensor], bins: int) -> Tensor:
    """(2, bins) float64: each bin's count and its scores' sum.

    Args:
        chunks: of scores in [0, 1], flat, float32, contiguous. What is beyond counts as the last
            bin's or the first's, NaN as the first's.

    Raises:
        ValueError: tensors of other shapes, types or devices than these, or not contiguous.
    """
    threads = torch.get_num_threads()
    tables_TB2 = torch.zeros(threads, bins, 2, dtype=torch.float64)
    for scores in chunks:
        check_tensor("scores", scores, torch.float32, (scores.numel(),))
        job = _Histogram(
            score=scores.data_ptr(),
            scores=len(scores),
            bins=bins,
            tables=threads,
            bin=tables_TB2.data_ptr(),
        )
        library.run("histogram", job, threads)
    return tables_TB2.sum(0).t()
