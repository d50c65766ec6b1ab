/* Pixel-wise refinement on a CPU in one pass, see `models.refinement`.
 *
 * The rows come in two pieces, those kept of an image's earlier part and the next ones, so that
 * none has to be copied to lie beside the others. Pixels are done in blocks, and the mean is only
 * computed in those where a pixel is to become one: most have none.
 *
 * Axes: H W the rows as they come, C channels.
 */

#include "vectors.h"

enum { BLOCK = 128 };

typedef struct {
    const float *prediction; /* (B, C, rows, W) at the strides below */
    int64_t image_stride, channel_stride, row_stride;
    const uint8_t *classes; /* (B, rows, W) at the strides below */
    int64_t class_image_stride, class_row_stride;
    int64_t rows;
} Piece;

typedef struct {
    int32_t images, channels, W;
    int32_t first, last; /* rows to give, counted through both pieces */
    Piece piece[2];
    float *out; /* (B, C, last - first, W) at the strides below */
    int64_t out_image_stride, out_channel_stride, out_row_stride;
    int64_t next; /* the next row that no thread has taken */
} Refinement;

typedef struct {
    const float *prediction;
    int64_t channel_stride;
    const uint8_t *classes;
} Row;

static Row row_at(const Refinement *job, int32_t image, int64_t y) {
    const Piece *piece = job->piece;
    if (y >= piece->rows) y -= piece++->rows;
    return (Row){
        piece->prediction + image * piece->image_stride + y * piece->row_stride,
        piece->channel_stride,
        piece->classes + image * piece->class_image_stride + y * piece->class_row_stride,
    };
}

static inline uint8_t larger(uint8_t a, uint8_t b) { return a > b ? a : b; }

/* Marks pixels x to x + count of a row that have a heavier one beside them; returns whether any
 * has. All have neighbours on both sides. */
static int mark(const uint8_t *const rows[3], int32_t x, int32_t count, uint8_t *marks) {
    uint8_t column[BLOCK + 2], any = 0;
    for (int32_t i = 0; i < count + 2; i++) {
        const int32_t at = x - 1 + i;
        column[i] = larger(larger(rows[0][at], rows[1][at]), rows[2][at]);
    }
    for (int32_t i = 0; i < count; i++) {
        const uint8_t most = larger(larger(column[i], column[i + 1]), column[i + 2]);
        marks[i] = most > rows[1][x + i];
        any |= marks[i];
    }
    return any;
}

/* The sums are in the order of plain torch, so that results are the same. */
static void average(const float *above, const float *here, const float *under, int32_t count,
                    const uint8_t *marks, float *restrict out) {
    for (int32_t i = 0; i < count; i++) {
        const float left = above[i - 1] + here[i - 1] + under[i - 1];
        const float middle = above[i] + here[i] + under[i];
        const float right = above[i + 1] + here[i + 1] + under[i + 1];
        const float mean = (left + middle + right) * (float)(1.0 / 9);
        out[i] = marks[i] ? mean : here[i];
    }
}

static void refine_row(const Refinement *job, int32_t image, int32_t y) {
    const int32_t W = job->W;
    const int64_t rows = job->piece[0].rows + job->piece[1].rows, step = job->out_channel_stride;
    const Row here = row_at(job, image, y);
    float *out = job->out + image * job->out_image_stride + (y - job->first) * job->out_row_stride;
    if (y == 0 || y + 1 == rows || W < 3) {
        for (int32_t c = 0; c < job->channels; c++)
            memcpy(out + c * step, here.prediction + c * here.channel_stride, sizeof(float) * W);
        return;
    }
    const Row above = row_at(job, image, y - 1), under = row_at(job, image, y + 1);
    const uint8_t *const classes[3] = {above.classes, here.classes, under.classes};
    for (int32_t c = 0; c < job->channels; c++) {
        const float *from = here.prediction + c * here.channel_stride;
        out[c * step] = from[0];
        out[c * step + W - 1] = from[W - 1];
    }
    for (int32_t x = 1; x < W - 1; x += BLOCK) {
        const int32_t count = W - 1 - x < BLOCK ? W - 1 - x : BLOCK;
        uint8_t marks[BLOCK];
        const int any = mark(classes, x, count, marks);
        for (int32_t c = 0; c < job->channels; c++) {
            const float *from = here.prediction + c * here.channel_stride + x;
            if (any)
                average(above.prediction + c * above.channel_stride + x, from,
                        under.prediction + c * under.channel_stride + x, count, marks,
                        out + c * step + x);
            else
                memcpy(out + c * step + x, from, sizeof(float) * count);
        }
    }
}

/* Works on rows until all are taken: to be called by each thread. */
void pcsr_refine_work(void *argument) {
    Refinement *job = argument;
    const int64_t rows = job->last - job->first;
    for (;;) {
        const int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (task >= rows * job->images) return;
        refine_row(job, task / rows, job->first + task % rows);
    }
}
