/* Networks of convolutions as streams of rows on a CPU.
 *
 * A network is a list of steps. Each makes the rows of one buffer from those of others: a sum of
 * convolutions, a bias, what is added, an activation, in one pass. A buffer is a ring of the rows
 * that the steps behind it still need, so that an image of any height takes the same memory, and
 * what one step writes is still in the cache when the next one reads it.
 *
 * A row is (C, stride) float32, with zeros to the left and right of the image: pixels are lanes, so
 * that groups of any number of channels fill the vectors. A product is a tile of T outputs by V
 * vectors of pixels, held in registers.
 *
 * Rows are given in runs, as they come; `position` counts them. A buffer lags behind by its radius:
 * with `position` rows given, its first `position - lag` are determined. After the image's last
 * row the position goes on, until the last buffer has all its rows; rows beyond the image are zero.
 *
 * Threads take parts of the image, by columns or rows, each with rings of its own: where parts
 * meet, a few columns or rows are computed by both, which costs less than to wait for each other
 * at every step and to read what another core has just written. A thread that is done joins one
 * that is not.
 *
 * Axes: C channels, h w LR.
 */

#include "vectors.h"

#if !defined(_WIN32)
#include <sched.h>
#endif

/* Columns of zeros to the left: as many as a vector of AVX-512 has lanes, and no kernel's radius is
 * greater. There are as many to the right. */
enum { MARGIN = 16 };
enum { NO_ACTIVATION, RELU, SLOPES };
enum { IN_FLOAT, TO_HALF, IN_HALF }; /* kinds of steps */

typedef struct {
    int32_t channels;
    int32_t rows; /* that the ring holds; 0 for the last one, whose rows go to the output */
    int32_t lag;
    int64_t first; /* where it begins in the arena, in floats */
} Buffer;

typedef struct {
    int32_t buffer, channels; /* channels of a group */
    int32_t size;             /* of the kernel: size by size, odd */
} Source;

typedef struct {
    int32_t target, outputs, groups, sources;
    int32_t added; /* buffer, or -1 */
    int32_t activation;
    int32_t kind;
    const Source *source;
    const void *weight; /* of each group, tiles; of each, (source, row, input, column, output) */
    const float *bias;  /* (outputs,) */
    const float *slope; /* (outputs,) of SLOPES: factor of what is below zero */
    const int32_t *slots; /* of half kinds, see rows_amx.h */
} Step;

/* Columns `left` to `left + w` of a run of rows. What it makes are the columns from `start` to `end`
 * (from `left`) and, of the rows that are determined, those from `top` to `bottom`. */
typedef struct {
    int32_t left, w, start, end, top, bottom;
    int32_t stride;      /* floats between the channels of a row */
    int32_t half_stride; /* pixels of a row in half precision, with its margins */
    int32_t steps;
    const Buffer *buffer; /* 0 takes the image, the last one is the output */
    const Step *step;
    float *arena;       /* zero before the first row */
    const float *zeros; /* a row of zeros, of the most channels there are */
    int32_t h;          /* the image's rows; more than any image has until it is known */
    int32_t position, last_position; /* before this run, and after it */
    int32_t chunk;      /* rows that go through all steps at once, at most */
    const float *in;    /* (rows, in_w, C of buffer 0), from row first_in */
    float *out;         /* (rows, C, out_stride) of the last buffer, from row first_out; of a step
                           in half precision (rows, out_stride, C) */
    int32_t in_w, first_in, out_stride, first_out;

    /* What the threads share. */
    int32_t lock, threads, waiting, phase, done;
    int32_t current;    /* step; -1 before the first */
    int32_t chunk_end;  /* position after this chunk, which begins at `position` */
    int32_t first_row, tasks_per_row;
    int64_t next, tasks;
} Part;

typedef struct {
    int32_t parts, next; /* next: the next part that no thread has begun */
    Part *const *part;
} Run;

int32_t pcsr_rows_margin(void) { return MARGIN; }

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
static inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* Row y of a ring, at column 0 of channel 0. */
static float *row_of(const Part *part, int32_t index, int32_t y) {
    const Buffer *buffer = &part->buffer[index];
    const int64_t size = (int64_t)buffer->channels * part->stride;
    return part->arena + buffer->first + y % buffer->rows * size + MARGIN;
}

static const float *row_or_zeros(const Part *part, int32_t index, int32_t y) {
    return y < 0 || y >= part->h ? part->zeros + MARGIN : row_of(part, index, y);
}

/* The rows of a buffer, from *first, that a chunk determines. The further a buffer is from the last
 * one, the more rows and columns around the part's own does it need. */
static int32_t rows_of_chunk(const Part *part, int32_t index, int32_t *first) {
    const int32_t lag = part->buffer[index].lag;
    const int32_t around = part->buffer[part->steps].lag - lag;
    const int32_t top = larger(part->top - around, 0);
    const int32_t bottom = larger(smaller(part->bottom + around, part->h), top);
    *first = smaller(larger(part->position - lag, top), bottom);
    return smaller(larger(part->chunk_end - lag, top), bottom) - *first;
}

static int32_t first_column(const Part *part, int32_t index) {
    const int32_t around = part->buffer[part->steps].lag - part->buffer[index].lag;
    return larger(part->start - around, 0) / LANES * LANES;
}

static int32_t last_column(const Part *part, int32_t index) {
    const int32_t around = part->buffer[part->steps].lag - part->buffer[index].lag;
    return smaller(part->end + around, part->w);
}

/* A row of the image, (w, C) to (C, stride). */
static void take_row(const Part *part, int32_t y) {
    const int32_t channels = part->buffer[0].channels, w = part->w;
    const float *from =
        part->in + ((int64_t)(y - part->first_in) * part->in_w + part->left) * channels;
    float *to = row_of(part, 0, y);
    for (int32_t c = 0; c < channels; c++)
        for (int32_t x = 0; x < w; x++) to[(int64_t)c * part->stride + x] = from[x * channels + c];
}

/* The sums of one tile at some columns, without bias, to (count, GROUP). `rows` are the rows that
 * it reads, of each source from top to bottom, at its group's first channel and leftmost column. */
ALWAYS_INLINE void sums(const int count, const int vectors, const Step *step, int64_t stride,
                        const float *weight, const float *const *rows, int32_t x, vec *out) {
    vec sum[TILE][VECTORS];
    for (int o = 0; o < count; o++)
        for (int n = 0; n < vectors; n++) sum[o][n] = (vec){0};
    for (int32_t i = 0; i < step->sources; i++) {
        const int32_t size = step->source[i].size, channels = step->source[i].channels;
        for (int32_t dy = 0; dy < size; dy++) {
            const float *from = *rows++ + x;
            for (int32_t c = 0; c < channels; c++, from += stride)
                for (int32_t dx = 0; dx < size; dx++, weight += count) {
                    vec in[VECTORS];
                    for (int n = 0; n < vectors; n++) {
                        in[n] = *(const unaligned_vec *)(from + dx + n * LANES);
                        IN_REGISTER(in[n]);
                    }
                    for (int o = 0; o < count; o++)
                        for (int n = 0; n < vectors; n++)
                            sum[o][n] = multiply_add(weight[o], in[n], sum[o][n]);
                }
        }
    }
    for (int o = 0; o < count; o++)
        for (int n = 0; n < vectors; n++) out[o * VECTORS + n] = sum[o][n];
}

/* Sums of `count` outputs at some columns to the step's output there. */
static void finish(const Step *step, int32_t channel, int32_t count, int32_t vectors,
                   const vec *from, const float *added, int64_t added_stride, float *to,
                   int64_t to_stride) {
    for (int32_t o = 0; o < count; o++)
        for (int32_t n = 0; n < vectors; n++) {
            vec y = from[o * VECTORS + n] + step->bias[channel + o];
            if (added) y += *(const vec *)(added + o * added_stride + n * LANES);
            if (step->activation == RELU) y = relu(y);
            if (step->activation == SLOPES) y = relu(y) - step->slope[channel + o] * relu(-y);
            *(vec *)(to + o * to_stride + n * LANES) = y;
        }
}

/* One tile of a step along a row. */
static void run_tile(const Part *part, const Step *step, int32_t y, int32_t index,
                     const float **rows) {
    const int32_t outputs = step->outputs / step->groups, per_group = tiles(outputs);
    const int32_t group = index / per_group, t = index % per_group;
    const int32_t first = t * outputs / per_group, size = (t + 1) * outputs / per_group - first;
    const int32_t channel = group * outputs + first;
    const int64_t stride = part->stride;
    int32_t inputs = 0, count = 0;
    for (int32_t i = 0; i < step->sources; i++) {
        const Source *source = &step->source[i];
        const int32_t radius = source->size / 2;
        inputs += source->channels * source->size * source->size;
        for (int32_t dy = -radius; dy <= radius; dy++)
            rows[count++] = row_or_zeros(part, source->buffer, y + dy) +
                            group * source->channels * stride - radius;
    }
    const float *weight = (const float *)step->weight + (int64_t)channel * inputs;
    const float *added =
        step->added < 0 ? NULL : row_of(part, step->added, y) + channel * stride;
    const int is_last = step->target == part->steps;
    const int64_t to_stride = is_last ? part->out_stride : stride;
    float *to = is_last ? part->out + (y - part->first_out) * step->outputs * to_stride +
                              MARGIN + part->left
                        : row_of(part, step->target, y);
    to += channel * to_stride;
    const int32_t end = last_column(part, step->target);
    for (int32_t x = first_column(part, step->target); x < end; x += GROUP) {
        vec out[TILE * VECTORS];
        const int32_t vectors = end - x <= LANES ? 1 : VECTORS;
#define TAIL(N) sums(N, 1, step, stride, weight, rows, x, out)
#define WHOLE(N) sums(N, VECTORS, step, stride, weight, rows, x, out)
        if (vectors == 1)
            switch (size) { CASES(TAIL) }
        else
            switch (size) { CASES(WHOLE) }
#undef TAIL
#undef WHOLE
        finish(step, channel, size, vectors, out, added ? added + x : NULL, stride, to + x,
               to_stride);
    }
    if (!is_last && end == part->w)
        for (int32_t o = 0; o < size; o++) memset(to + o * stride + end, 0, 4 * MARGIN);
}

#include "rows_amx.h"

int32_t pcsr_rows_half_margin(void) { return HALF_MARGIN; }

static int32_t tasks_per_row(const Step *step) {
    if (step->kind == TO_HALF) return 1;
    if (step->kind == IN_HALF) return half_pairs(step);
    return step->groups * tiles(step->outputs / step->groups);
}

static void run_task(const Part *part, const Step *step, int32_t y, int32_t index,
                     const void **rows) {
    if (step->kind == TO_HALF)
        to_half(part, step, y);
    else if (step->kind == IN_HALF)
        run_half(part, step, y, index, rows);
    else
        run_tile(part, step, y, index, (const float **)rows);
}

/* Sets up the next step that has rows to make; `done` where there is none. */
static void advance(Part *part) {
    for (;;) {
        if (++part->current == part->steps) {
            part->position = part->chunk_end;
            part->current = -1;
        }
        if (part->current < 0) {
            if (part->position == part->last_position) {
                __atomic_store_n(&part->done, 1, __ATOMIC_RELEASE);
                return;
            }
            part->chunk_end = part->last_position - part->position < part->chunk
                ? part->last_position : part->position + part->chunk;
        }
        const Step *step = part->current < 0 ? NULL : &part->step[part->current];
        const int32_t rows = rows_of_chunk(part, step ? step->target : 0, &part->first_row);
        part->tasks_per_row = step ? tasks_per_row(step) : 1;
        part->tasks = (int64_t)rows * part->tasks_per_row;
        part->next = 0;
        if (part->tasks) return;
    }
}

static void pause_thread(int32_t turn) {
#if !defined(_WIN32)
    if (turn > 4096) sched_yield();
#endif
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void lock(Part *part) {
    for (int32_t turn = 0; __atomic_exchange_n(&part->lock, 1, __ATOMIC_ACQUIRE); turn++)
        pause_thread(turn);
}

static void unlock(Part *part) { __atomic_store_n(&part->lock, 0, __ATOMIC_RELEASE); }

/* Works on a part until it is done; others may be at it, or come later. */
static void work_on(Part *part, const void **rows) {
    if (__atomic_load_n(&part->done, __ATOMIC_ACQUIRE)) return;
    lock(part);
    if (part->current < -1) {
        part->current = part->steps - 1;
        part->chunk_end = part->position;
        advance(part);
    }
    part->threads++;
    unlock(part);
    while (!__atomic_load_n(&part->done, __ATOMIC_ACQUIRE)) {
        for (;;) {
            const int64_t task = __atomic_fetch_add(&part->next, 1, __ATOMIC_RELAXED);
            if (task >= part->tasks) break;
            const int32_t y = part->first_row + task / part->tasks_per_row;
            if (part->current < 0)
                take_row(part, y);
            else
                run_task(part, &part->step[part->current], y, task % part->tasks_per_row, rows);
        }
        lock(part);
        const int32_t phase = part->phase;
        const int is_last = ++part->waiting == part->threads;
        if (is_last) {
            part->waiting = 0;
            advance(part);
            __atomic_store_n(&part->phase, phase + 1, __ATOMIC_RELEASE);
        }
        unlock(part);
        for (int32_t turn = 0;
             !is_last && __atomic_load_n(&part->phase, __ATOMIC_ACQUIRE) == phase; turn++)
            pause_thread(turn);
    }
}

/* Works on a run until all of its parts are done: to be called by each thread. */
void pcsr_rows_work(void *argument) {
    Run *run = argument;
    int32_t most = 0, is_half = 0;
    for (int32_t s = 0; s < run->part[0]->steps; s++) {
        const Step *step = &run->part[0]->step[s];
        int32_t count = 0;
        is_half |= step->kind == IN_HALF;
        for (int32_t i = 0; i < step->sources; i++) count += step->source[i].size;
        most = larger(most, count);
    }
    const void **rows = malloc(sizeof(*rows) * most);
    if (!rows) return; /* the others do its work */
    HalfState state;
    if (is_half) begin_half(&state);
    for (;;) {
        const int32_t own = __atomic_fetch_add(&run->next, 1, __ATOMIC_RELAXED);
        if (own >= run->parts) break;
        work_on(run->part[own], rows);
    }
    for (int32_t p = 0; p < run->parts; p++) work_on(run->part[p], rows);
    if (is_half) end_half(&state);
    free(rows);
}
