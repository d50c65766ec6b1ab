"""Strips of rows that are worked on at once, so that what is computed of them stays in cache.

Axes: h w LR, H W output.
"""

from collections.abc import Iterator

from models.grid import PixelGrid


def lr_strips(h: int, w: int, most_px: int) -> Iterator[slice]:
    """Strips of LR rows of at most `most_px` pixels, or of one row."""
    most = max(1, most_px // w)
    count = -(-h // most)
    # Of equal height: a rest of a row or two would take as long as a strip.
    for index in range(count):
        yield slice(index * h // count, (index + 1) * h // count)


def out_strips(grid: PixelGrid, most_px: int) -> Iterator[tuple[int, int, slice]]:
    """(first, last) output rows of at most `most_px` pixels, or one; and the LR rows they read."""
    H, W = grid.out_size
    step = max(1, most_px // W)
    for first in range(0, H, step):
        last = min(H, first + step)
        nearest = grid.rows.nearest
        yield first, last, slice(int(nearest[first]), int(nearest[last - 1]) + 1)


def strip_sizes(grid: PixelGrid, most_px: int) -> Iterator[tuple[int, int]]:
    """Output rows and LR pixels of each strip: of LR rows at an integer scale, else of output's."""
    h, w, scale = grid.rows.lr_len, grid.cols.lr_len, grid.integer_scale
    if scale is None:
        for first, last, lr_rows in out_strips(grid, most_px):
            yield last - first, (lr_rows.stop - lr_rows.start) * w
    else:
        for rows in lr_strips(h, w, most_px):
            count = rows.stop - rows.start
            yield count * scale, count * w


def row_heights(grid: PixelGrid, most_px: int) -> Iterator[int]:
    """Output rows of each LR row that has some; of each strip that shares it."""
    scale = grid.integer_scale
    if scale is not None:
        yield from [scale] * grid.rows.lr_len
        return
    for first, last, _ in out_strips(grid, most_px):
        nearest = grid.rows.nearest[first:last]
        yield from nearest.unique_consecutive(return_counts=True)[1].tolist()
