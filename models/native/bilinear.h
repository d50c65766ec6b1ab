/* Bilinear enlargement of an LR image, row by row, as `PixelGrid.bilinear` has it. */

#ifndef PCSR_BILINEAR_H
#define PCSR_BILINEAR_H

#include "vectors.h"

/* The LR pixels on both sides of each output pixel, and the weight of the second. */
typedef struct {
    const int32_t *lower, *upper;
    const float *weight;
} Sides;

typedef struct {
    const float *lr; /* (C, h, w) of the whole image at the strides below */
    int64_t row_stride, channel_stride;
    Sides rows, cols;
} Bilinear;

/* Two LR rows that were enlarged along the row, for the output rows between them. */
typedef struct {
    int64_t row[2]; /* of the image; -1 where there is none */
    float *wide[2]; /* (C, width) */
} WideRows;

static inline float lerp(float from, float to, float weight) {
    /* In the order of plain torch, so that results are the same. */
    const int nearer = weight < 0.5f;
    return (nearer ? from : to) + (nearer ? weight : weight - 1.0f) * (to - from);
}

/* Columns `first` to `first + count` of an LR row; those before must be of the same columns. */
static const float *wide_row(const Bilinear *b, int32_t channels, int32_t row, int32_t first,
                             int32_t count, WideRows *kept) {
    float *wide = kept->wide[row & 1];
    if (kept->row[row & 1] == row) return wide;
    kept->row[row & 1] = row;
    const int32_t *lower = b->cols.lower + first, *upper = b->cols.upper + first;
    const float *weight = b->cols.weight + first;
    for (int32_t c = 0; c < channels; c++) {
        const float *from = b->lr + c * b->channel_stride + row * b->row_stride;
        float *restrict to = wide + (int64_t)c * count;
        for (int32_t i = 0; i < count; i++)
            to[i] = lerp(from[lower[i]], from[upper[i]], weight[i]);
    }
    return wide;
}

/* Columns `first` to `first + count` of an output row, to `out` (C, count) at `stride`. */
static void enlarge_row(const Bilinear *b, int32_t channels, int32_t row, int32_t first,
                        int32_t count, WideRows *kept, float *restrict out, int64_t stride) {
    const float *above = wide_row(b, channels, b->rows.lower[row], first, count, kept);
    const float *under = wide_row(b, channels, b->rows.upper[row], first, count, kept);
    const float weight = b->rows.weight[row];
    for (int32_t c = 0; c < channels; c++, out += stride, above += count, under += count)
        for (int32_t i = 0; i < count; i++) out[i] = lerp(above[i], under[i], weight);
}

#endif
