/* Pixel-level MLPs on a CPU: first layer, position, all layers and the scatter in one pass.
 *
 * One task is a segment of an LR row: its features are gathered as channels by pixels, the first
 * layer's product is computed on them, and then the output pixels go through the other layers in groups
 * that fit the vector registers, with activations that never leave the first-level cache. A product
 * is a tile of T outputs by V vectors of pixels, held in registers; the weights of a tile lie in the
 * order in which it reads them. No array of the output's size is made, and nothing is gathered
 * where all pixels of a segment are computed.
 *
 * Axes: C channels, D width of the first layer, O outputs, h w LR, H W output, P terms.
 */

#include "bilinear.h"
#include "layers.h"
#include "mlp_amx.h"
#include "vectors.h"

/* LR pixels of a row at once, a multiple of GROUP; and what their arrays are wide: columns of a
 * width that is a power of two would share a few sets of the cache. */
enum { SEGMENT = 256, STRIDE = SEGMENT + GROUP };

/* What position adds to the first layer is a row of `terms` (P, D), and where `rows` is not null
 * also one of `rows` (H, D); D filled up to full vectors. */
typedef struct {
    int32_t layers;
    const Layer *layer;
    const float *terms, *rows;
    const HalfMlp *half; /* the same in half precision; null where it runs in float32 */
} Mlp;

typedef struct {
    int32_t h, w, channels, H, W;
    int32_t scale;            /* where it is an integer, the same on both axes; else 0 */
    const float *feat;        /* (h, w, C) at the strides below */
    int64_t row_stride, pixel_stride, channel_stride;
    const int32_t *first_out; /* (h + 1,) output rows of LR row r: first_out[r] to first_out[r+1] */
    const int32_t *nearest;   /* (W,) LR column */
    const int32_t *first_col; /* (segments + 1,) first output column of each segment */
    int32_t mlps;             /* light to heavy; to classify, one */
    const Mlp *mlp;
    const uint8_t *classes;   /* (H, W); null to classify */
    float *out;               /* (O, H, W), overwritten */
    const float *gain;        /* (O,) factor of what the MLPs add to the enlarged LR */
    Bilinear enlarged;        /* of O channels; not read to classify */
    int64_t next;             /* the next task that no thread has taken */
    int64_t macs;             /* multiply-adds, without those of lanes that fill a vector */
} Job;

/* Where an output pixel of a group lies. */
typedef struct {
    int32_t source; /* LR column, from the segment's first */
    int32_t term;
    int64_t pixel; /* H W, row-major */
} Pixel;

typedef struct {
    float *feat;  /* (C, STRIDE) */
    float *first; /* (D, STRIDE) */
    float *of_lr; /* the same as (SEGMENT, D), D filled up to full vectors */
    float *x, *y; /* (widest, GROUP) */
    float *columns; /* (O + 1, scale, GROUP) */
    Pixel *pixels;
    HalfScratch half;
    WideRows rows; /* (O, W) each */
    int64_t macs;
} Scratch;

int32_t pcsr_tile(void) { return TILE; }
int32_t pcsr_lanes(void) { return LANES; }
int32_t pcsr_group(void) { return GROUP; }
int32_t pcsr_segment(void) { return SEGMENT; }

/* The layers behind the first on a group; returns where their outputs (O, GROUP) are. */
static const float *finish(const Mlp *mlp, Scratch *s) {
    float *x = s->x, *y = s->y;
    for (int32_t l = 1; l < mlp->layers; l++) {
        apply(&mlp->layer[l], x, GROUP, y, GROUP, l + 1 < mlp->layers);
        float *swap = x;
        x = y;
        y = swap;
    }
    return x;
}

/* Up to full vectors. */
static inline int32_t full(int32_t width) { return (width + LANES - 1) / LANES * LANES; }

static int32_t outputs_of(const Mlp *mlp) { return mlp->layer[mlp->layers - 1].outputs; }

static void count_macs(const Mlp *mlp, int32_t first, int64_t pixels, Scratch *s) {
    for (int32_t l = first; l < (first ? mlp->layers : 1); l++)
        s->macs += pixels * mlp->layer[l].inputs * mlp->layer[l].outputs;
}

static void store(const Job *job, const float *y, int32_t outputs, const Pixel *pixels,
                  int32_t count) {
    const int64_t plane = (int64_t)job->H * job->W;
    for (int32_t o = 0; o < outputs; o++) {
        float *out = job->out + o * plane;
        const float *from = y + o * GROUP;
        if (job->classes) {
            const float gain = job->gain[o];
            for (int32_t i = 0; i < count; i++) out[pixels[i].pixel] += gain * from[i];
        } else {
            for (int32_t i = 0; i < count; i++) out[pixels[i].pixel] = from[i];
        }
    }
}

/* The first layer's outputs on LANES output pixels, LANES of its width. Whole vectors are read and
 * then turned: to gather what lies apart takes four times as long. */
ALWAYS_INLINE void first_activations(
    const float *of_lr, const float *terms, const float *of_row, int32_t width,
    const int32_t *source, const int32_t *term, int with_relu, float *x) {
    const vec constant = of_row ? *(const unaligned_vec *)of_row : (vec){0};
    vec v[LANES];
#pragma GCC unroll 16
    for (int32_t i = 0; i < LANES; i++) {
        const vec of_term = *(const unaligned_vec *)(terms + (int64_t)term[i] * width);
        v[i] = *(const vec *)(of_lr + source[i] * width) + (of_term + constant);
        if (with_relu) v[i] = relu(v[i]);
    }
    zip(v, LANES);
#pragma GCC unroll 16
    for (int32_t i = 0; i < LANES; i++) *(vec *)(x + i * GROUP) = v[i];
}

/* Any pixels of a segment, in groups. */
static void scattered(const Job *job, const Mlp *mlp, int32_t row, int32_t count, Scratch *s) {
    const int32_t width = full(mlp->layer[0].outputs);
    const int32_t outputs = outputs_of(mlp);
    const float *of_row = mlp->rows ? mlp->rows + (int64_t)row * width : NULL;
    count_macs(mlp, 1, count, s);
    for (int32_t first = 0; first < count; first += GROUP) {
        const int32_t used = count - first < GROUP ? count - first : GROUP;
        const Pixel *pixels = s->pixels + first;
        int32_t source[GROUP], term[GROUP];
        for (int32_t i = 0; i < GROUP; i++) {
            const Pixel *pixel = &pixels[i < used ? i : used - 1];
            source[i] = pixel->source;
            term[i] = pixel->term;
        }
        for (int32_t i = 0; i < GROUP; i += LANES)
            for (int32_t d = 0; d < width; d += LANES)
                first_activations(s->of_lr + d, mlp->terms + d, of_row ? of_row + d : NULL, width,
                                  source + i, term + i, mlp->layers > 1,
                                  s->x + d * GROUP + i);
        store(job, finish(mlp, s), outputs, pixels, used);
    }
}

/* Output columns (GROUP * scale) from those of each phase (scale, GROUP). */
ALWAYS_INLINE void weave(const int32_t scale, const float *from, float *restrict to) {
    if (scale == 2 || scale == 4) {
        for (int32_t n = 0; n < VECTORS; n++, from += LANES, to += LANES * scale) {
            vec v[4];
            for (int32_t i = 0; i < scale; i++) v[i] = *(const vec *)(from + i * GROUP);
            zip(v, scale);
            for (int32_t i = 0; i < scale; i++) *(vec *)(to + i * LANES) = v[i];
        }
        return;
    }
    for (int32_t column = 0; column < scale; column++)
        for (int32_t i = 0; i < GROUP; i++) to[i * scale + column] = from[column * GROUP + i];
}

/* Pixels that lie beside one another in an output row; of upsamplers, those of the lightest. */
static void store_run(const Job *job, const float *y, int32_t o, int64_t at, int32_t count) {
    float *restrict out = job->out + (int64_t)o * job->H * job->W + at;
    if (!job->classes) {
        memcpy(out, y, sizeof(float) * count);
        return;
    }
    const uint8_t *classes = job->classes + at;
    const float gain = job->gain[o];
    for (int32_t i = 0; i < count; i++) out[i] = classes[i] == 0 ? out[i] + gain * y[i] : out[i];
}

/* All pixels of a segment at an integer scale, phase by phase: LR pixels are lanes. */
static void phases(const Job *job, const Mlp *mlp, int32_t r, int32_t q0, int32_t count,
                   Scratch *s) {
    const int32_t scale = job->scale, width = mlp->layer[0].outputs;
    const int32_t outputs = outputs_of(mlp);
    float *columns = s->columns, *run = columns + (int64_t)outputs * scale * GROUP;
    count_macs(mlp, 1, (int64_t)count * scale * scale, s);
    for (int32_t phase = 0; phase < scale * scale; phase += scale)
        for (int32_t q = 0; q < count; q += GROUP) {
            for (int32_t column = 0; column < scale; column++) {
                const float *terms = mlp->terms + (int64_t)(phase + column) * full(width);
                for (int32_t d = 0; d < width; d++) {
                    const vec *from = (const vec *)(s->first + d * STRIDE + q);
                    vec *x = (vec *)(s->x + d * GROUP);
                    for (int32_t n = 0; n < VECTORS; n++)
                        x[n] = mlp->layers > 1 ? relu(from[n] + terms[d]) : from[n] + terms[d];
                }
                const float *y = finish(mlp, s);
                for (int32_t o = 0; o < outputs; o++)
                    memcpy(columns + (o * scale + column) * GROUP, y + o * GROUP,
                           sizeof(float) * GROUP);
            }
            const int32_t used = count - q < GROUP ? count - q : GROUP;
            const int64_t row = r * scale + phase / scale;
            for (int32_t o = 0; o < outputs; o++) {
                const float *from = columns + (int64_t)o * scale * GROUP;
                switch (scale) {
                    case 2: weave(2, from, run); break;
                    case 4: weave(4, from, run); break;
                    default: weave(scale, from, run);
                }
                store_run(job, run, o, row * job->W + (int64_t)(q0 + q) * scale, used * scale);
            }
        }
}

/* LR columns q0 to q0 + count of a row as (C, STRIDE). */
static void gather(const Job *job, int32_t r, int32_t q0, int32_t count, float *to) {
    const int32_t channels = job->channels;
    const int64_t pixel = job->pixel_stride, channel = job->channel_stride;
    const float *from = job->feat + r * job->row_stride + q0 * pixel;
    if (pixel == 1) {
        for (int32_t c = 0; c < channels; c++)
            memcpy(to + c * STRIDE, from + c * channel, sizeof(float) * count);
    } else {
        for (int32_t q = 0; q < count; q++)
            for (int32_t c = 0; c < channels; c++)
                to[c * STRIDE + q] = from[q * pixel + c * channel];
    }
    const int32_t full = (count + GROUP - 1) / GROUP * GROUP;
    for (int32_t c = 0; c < channels; c++)
        for (int32_t q = count; q < full; q++) to[c * STRIDE + q] = 0.0f;
}

/* Pixels by channels from (width, STRIDE). */
static void turn(const float *first, int32_t width, int32_t count, float *to) {
    for (int32_t q = 0; q < count; q += LANES)
        for (int32_t d = 0; d < width; d += LANES) {
            vec v[LANES];
            for (int32_t i = 0; i < LANES; i++) v[i] = *(const vec *)(first + (d + i) * STRIDE + q);
            zip(v, LANES);
            for (int32_t i = 0; i < LANES; i++) *(vec *)(to + (q + i) * full(width) + d) = v[i];
        }
}

/* The pixels of class `wanted` (any where negative) in one output row of a segment. */
static int32_t list_pixels(const Job *job, int32_t row, int32_t segment, int wanted,
                           int32_t first_row, Pixel *pixels) {
    const int64_t start = (int64_t)row * job->W;
    const int32_t scale = job->scale, last = job->first_col[segment + 1];
    int32_t count = 0;
    for (int32_t X = job->first_col[segment]; X < last; X++) {
        if (wanted >= 0 && job->classes[start + X] != wanted) continue;
        const int32_t q = job->nearest[X];
        pixels[count].source = q - segment * SEGMENT;
        pixels[count].term = scale ? (row - first_row) * scale + X - q * scale : X;
        pixels[count].pixel = start + X;
        count++;
    }
    return count;
}

static int occurs(const Job *job, int32_t first, int32_t last, int wanted) {
    const size_t size = (size_t)(last - first) * job->W;
    return size && memchr(job->classes + (int64_t)first * job->W, wanted, size) != NULL;
}

/* Any pixels of a segment in half precision, in groups. */
static void half_scattered(const Job *job, const Mlp *mlp, int32_t row, int32_t count,
                           Scratch *s) {
    const int32_t outputs = outputs_of(mlp);
    const int64_t plane = (int64_t)job->H * job->W;
    count_macs(mlp, 1, count, s);
    for (int32_t first = 0; first < count; first += HALF_GROUP) {
        const int32_t used = count - first < HALF_GROUP ? count - first : HALF_GROUP;
        const Pixel *pixels = s->pixels + first;
        for (int32_t i = 0; i < used; i++)
            half_start(mlp->half, i, pixels[i].source, pixels[i].term, row, &s->half);
        half_finish(mlp->half, &s->half);
        for (int32_t o = 0; o < outputs; o++) {
            float *out = job->out + o * plane;
            const float gain = job->classes ? job->gain[o] : 1.0f;
            for (int32_t i = 0; i < used; i++) {
                const float y = gain * s->half.out[32 * i + o];
                out[pixels[i].pixel] = job->classes ? out[pixels[i].pixel] + y : y;
            }
        }
    }
}

/* One MLP on its pixels of a segment: on all of them as the lightest or the classifier. It is run
 * where any pixel of the whole row is of its class, which is what the cost of an image counts. */
static void run_segment(const Job *job, int32_t r, int32_t segment, int32_t j, Scratch *s) {
    const Mlp *mlp = &job->mlp[j];
    const int32_t first = job->first_out[r], last = job->first_out[r + 1];
    if (first == last || (job->classes && !occurs(job, first, last, j))) return;
    const int32_t q0 = segment * SEGMENT;
    const int32_t count = job->w - q0 < SEGMENT ? job->w - q0 : SEGMENT;
    if (mlp->half) {
        half_gather(job->feat + r * job->row_stride + q0 * job->pixel_stride, job->pixel_stride,
                    job->channel_stride, job->channels, count, mlp->half->layer[0].inputs,
                    s->half.feat);
        half_first(mlp->half, count, &s->half);
    } else {
        gather(job, r, q0, count, s->feat);
        for (int32_t q = 0; q < count; q += GROUP)
            apply(&mlp->layer[0], s->feat + q, STRIDE, s->first + q, STRIDE, 0);
    }
    count_macs(mlp, 0, count, s);
    if (job->scale && j == 0 && !mlp->half) {
        phases(job, mlp, r, q0, count, s);
        return;
    }
    if (!mlp->half) turn(s->first, mlp->layer[0].outputs, count, s->of_lr);
    const int wanted = job->classes ? j : -1;
    int32_t listed = 0;
    for (int32_t row = first; row < last; row++) {
        listed += list_pixels(job, row, segment, wanted, first, s->pixels + listed);
        if (!job->scale || row + 1 == last) {
            if (mlp->half)
                half_scattered(job, mlp, row, listed, s);
            else
                scattered(job, mlp, row, listed, s);
            listed = 0;
        }
    }
}

/* The enlarged LR in all pixels of a segment, which are then still in the cache when MLPs add. */
static void enlarge(const Job *job, int32_t r, int32_t segment, Scratch *s) {
    const int32_t channels = outputs_of(&job->mlp[0]), first = job->first_col[segment];
    const int32_t count = job->first_col[segment + 1] - first;
    s->rows.row[0] = s->rows.row[1] = -1;
    for (int32_t row = job->first_out[r]; row < job->first_out[r + 1]; row++)
        enlarge_row(&job->enlarged, channels, row, first, count, &s->rows,
                    job->out + (int64_t)row * job->W + first, (int64_t)job->H * job->W);
}

static int32_t widest(const Job *job) {
    int32_t most = 1;
    for (int32_t j = 0; j < job->mlps; j++)
        for (int32_t l = 0; l < job->mlp[j].layers; l++)
            if (job->mlp[j].layer[l].outputs > most) most = job->mlp[j].layer[l].outputs;
    return most;
}

/* Memory for the MLPs in half precision; false where there is not enough. */
static int allocate_half(const Job *job, HalfScratch *half) {
    size_t inputs = 0, width = 0, most = 0;
    for (int32_t j = 0; j < job->mlps; j++) {
        const HalfMlp *mlp = job->mlp[j].half;
        if (!mlp) continue;
        const size_t its_inputs = mlp->layer[0].inputs, its_width = mlp->layer[0].outputs;
        const size_t its_most = half_widest(mlp);
        if (its_inputs > inputs) inputs = its_inputs;
        if (its_width > width) width = its_width;
        if (its_most > most) most = its_most;
    }
    if (!most) return 1;
    half->feat = allocate(sizeof(uint16_t) * SEGMENT * inputs);
    half->first = allocate(sizeof(float) * SEGMENT * width);
    half->x = allocate(sizeof(uint16_t) * HALF_GROUP * most);
    half->y = allocate(sizeof(uint16_t) * HALF_GROUP * most);
    half->out = allocate(sizeof(float) * HALF_GROUP * 32);
    if (!half->feat || !half->first || !half->x || !half->y || !half->out) return 0;
    memset(half->x, 0, sizeof(uint16_t) * HALF_GROUP * most);
    return 1;
}

/* Works on tasks until all are taken: to be called by each thread. Where one has no memory, the
 * others do its work; `next` tells whether any did. */
void pcsr_work(void *argument) {
    Job *job = argument;
    const int32_t segments = (job->w + SEGMENT - 1) / SEGMENT;
    const int64_t tasks = (int64_t)job->h * segments;
    const size_t width = full(widest(job)), scale = job->scale;
    const size_t columns = job->w < SEGMENT ? job->w : SEGMENT;
    const size_t outputs = outputs_of(&job->mlp[0]), wide = job->classes ? outputs * job->W : 1;
    const size_t most = scale ? columns * scale * scale : (size_t)job->W;
    Scratch s = {
        .feat = allocate(sizeof(float) * job->channels * STRIDE),
        .first = allocate(sizeof(float) * width * STRIDE),
        .of_lr = allocate(sizeof(float) * width * SEGMENT),
        .x = allocate(sizeof(float) * width * GROUP),
        .y = allocate(sizeof(float) * width * GROUP),
        .columns = allocate(sizeof(float) * (outputs + 1) * (scale ? scale : 1) * GROUP),
        .pixels = allocate(sizeof(Pixel) * most),
    };
    s.rows.wide[0] = allocate(sizeof(float) * 2 * wide);
    s.rows.wide[1] = s.rows.wide[0] + wide;
    if (s.feat && s.first && s.of_lr && s.x && s.y && s.columns && s.pixels && s.rows.wide[0] &&
        allocate_half(job, &s.half)) {
        HalfState state;
        if (s.half.x) begin_half(&state);
        /* What fills vectors up is computed with, though no result is used. */
        memset(s.first, 0, sizeof(float) * width * STRIDE);
        for (;;) {
            const int64_t task = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
            if (task >= tasks) break;
            const int32_t r = task / segments, segment = task % segments;
            if (job->classes) enlarge(job, r, segment, &s);
            for (int32_t j = 0; j < job->mlps; j++) run_segment(job, r, segment, j, &s);
        }
        if (s.half.x) end_half(&state);
        __atomic_fetch_add(&job->macs, s.macs, __ATOMIC_RELAXED);
    }
    free(s.half.feat);
    free(s.half.first);
    free(s.half.x);
    free(s.half.y);
    free(s.half.out);
    free(s.feat);
    free(s.first);
    free(s.of_lr);
    free(s.x);
    free(s.y);
    free(s.columns);
    free(s.pixels);
    free(s.rows.wide[0]);
}
