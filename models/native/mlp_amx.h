/* Wide MLPs in bfloat16, with sums in float32, on processors with AMX. Part of pixel_mlp.c.
 *
 * Pixels are the rows of matrix tiles, channels their columns: a group of 32 pixels goes through
 * all layers, two tiles of it by two of outputs at a time. Channels are filled up to multiples of
 * 32 with zeros. What position adds to the first layer stays in float32.
 */

#include "amx.h"

enum { HALF_GROUP = 32 };

/* A layer's weights, by pair of output tiles, of each by 32 inputs, the two tiles of a pair. */
typedef struct {
    int32_t inputs, outputs; /* multiples of 32 */
    const uint16_t *weight;
    const float *bias; /* (outputs,) */
} HalfLayer;

/* What position adds: a row of `terms` (P, width) and, where not null, of `rows` (H, width). */
typedef struct {
    int32_t layers;
    const HalfLayer *layer;
    const float *terms, *rows;
} HalfMlp;

typedef struct {
    uint16_t *feat;  /* (SEGMENT, inputs) */
    float *first;    /* (SEGMENT, width) */
    uint16_t *x, *y; /* (HALF_GROUP, widest) */
    float *out;      /* (HALF_GROUP, 32): a group's outputs */
} HalfScratch;

static int32_t half_widest(const HalfMlp *mlp) {
    int32_t most = 32;
    for (int32_t l = 0; l < mlp->layers; l++)
        if (mlp->layer[l].outputs > most) most = mlp->layer[l].outputs;
    return most;
}

#if defined(PCSR_HAS_AMX)

/* One pair of output tiles for 32 pixels (rows, inputs) into tile registers 0 to 3. */
ALWAYS_INLINE void half_pair(const HalfLayer *layer, int32_t pair, const uint16_t *x,
                             const float *bias) {
    const int32_t blocks = layer->inputs / 32;
    const int64_t stride = 2 * layer->inputs;
    const uint16_t *weight = layer->weight + (int64_t)pair * blocks * 1024;
    _tile_loadd(0, bias, 0);
    _tile_loadd(1, bias + 16, 0);
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + 16, 0);
    for (int32_t block = 0; block < blocks; block++, weight += 1024) {
        const uint16_t *in = x + 32 * block;
        _tile_loadd(4, in, stride);
        _tile_loadd(6, weight, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weight + 512, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, in + 16 * layer->inputs, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

/* The first layer's product on a segment's LR pixels, whose number is filled up to a group. */
static void half_first(const HalfMlp *mlp, int32_t count, const HalfScratch *s) {
    const HalfLayer *layer = &mlp->layer[0];
    const int64_t stride = 4 * layer->outputs;
    for (int32_t q = 0; q < count; q += HALF_GROUP)
        for (int32_t pair = 0; pair < layer->outputs / 32; pair++) {
            float *to = s->first + (int64_t)q * layer->outputs + 32 * pair;
            half_pair(layer, pair, s->feat + (int64_t)q * layer->inputs, layer->bias + 32 * pair);
            _tile_stored(0, to, stride);
            _tile_stored(1, to + 16, stride);
            _tile_stored(2, to + 16 * layer->outputs, stride);
            _tile_stored(3, to + 16 * layer->outputs + 16, stride);
        }
}

/* The first layer's activations of one pixel. */
static void half_start(const HalfMlp *mlp, int32_t i, int32_t source, int32_t term, int32_t row,
                       const HalfScratch *s) {
    const int32_t width = mlp->layer[0].outputs;
    const float *of_lr = s->first + (int64_t)source * width;
    const float *of_term = mlp->terms + (int64_t)term * width;
    const float *of_row = mlp->rows ? mlp->rows + (int64_t)row * width : NULL;
    const __m512 zero = _mm512_setzero_ps();
    uint16_t *x = s->x + (int64_t)i * width;
    for (int32_t d = 0; d < width; d += 32) {
        __m512 part[2];
        for (int32_t n = 0; n < 2; n++) {
            const int32_t at = d + 16 * n;
            part[n] = _mm512_add_ps(_mm512_loadu_ps(of_lr + at), _mm512_loadu_ps(of_term + at));
            if (of_row) part[n] = _mm512_add_ps(part[n], _mm512_loadu_ps(of_row + at));
            part[n] = _mm512_max_ps(zero, part[n]); /* nan stays */
        }
        store_half(x + d, part[0], part[1]);
    }
}

/* The layers behind the first on a group, from s->x to s->out. */
static void half_finish(const HalfMlp *mlp, const HalfScratch *s) {
    uint16_t *x = s->x, *y = s->y;
    const __m512 zero = _mm512_setzero_ps();
    for (int32_t l = 1; l < mlp->layers; l++) {
        const HalfLayer *layer = &mlp->layer[l];
        const int is_last = l + 1 == mlp->layers;
        for (int32_t pair = 0; pair < (is_last ? 1 : layer->outputs / 32); pair++) {
            half_pair(layer, pair, x, layer->bias + 32 * pair);
            float sums[1024] __attribute__((aligned(64))), *to = is_last ? s->out : sums;
            _tile_stored(0, to, 128);
            _tile_stored(1, to + 16, 128);
            _tile_stored(2, to + 512, 128);
            _tile_stored(3, to + 528, 128);
            for (int32_t i = 0; !is_last && i < HALF_GROUP; i++)
                store_half(y + (int64_t)i * layer->outputs + 32 * pair,
                           _mm512_max_ps(zero, _mm512_load_ps(sums + 32 * i)),
                           _mm512_max_ps(zero, _mm512_load_ps(sums + 32 * i + 16)));
        }
        uint16_t *swap = x;
        x = y;
        y = swap;
    }
}

/* (count, channels) floats at some strides to (count, inputs) in half precision. */
static void half_gather(const float *from, int64_t pixel, int64_t channel, int32_t channels,
                        int32_t count, int32_t inputs, uint16_t *to) {
    const int32_t full = (count + HALF_GROUP - 1) / HALF_GROUP * HALF_GROUP;
    memset(to, 0, sizeof(*to) * full * inputs);
    for (int32_t q = 0; q < count; q++) {
        uint16_t *row = to + (int64_t)q * inputs;
        const float *at = from + q * pixel;
        for (int32_t c = 0; c < channels; c += 16) {
            const int32_t some = channels - c < 16 ? channels - c : 16;
            __m512 values;
            if (channel == 1) {
                values = _mm512_maskz_loadu_ps((1u << some) - 1, at + c);
            } else {
                float parts[16] = {0};
                for (int32_t n = 0; n < some; n++) parts[n] = at[(c + n) * channel];
                values = _mm512_loadu_ps(parts);
            }
            _mm256_mask_storeu_epi16(row + c, (1u << some) - 1,
                                     (__m256i)_mm512_cvtneps_pbh(values));
        }
    }
}

#else

static void half_first(const HalfMlp *mlp, int32_t count, const HalfScratch *s) {
    (void)mlp, (void)count, (void)s;
}
static void half_start(const HalfMlp *mlp, int32_t i, int32_t source, int32_t term, int32_t row,
                       const HalfScratch *s) {
    (void)mlp, (void)i, (void)source, (void)term, (void)row, (void)s;
}
static void half_finish(const HalfMlp *mlp, const HalfScratch *s) { (void)mlp, (void)s; }
static void half_gather(const float *from, int64_t pixel, int64_t channel, int32_t channels,
                        int32_t count, int32_t inputs, uint16_t *to) {
    (void)from, (void)pixel, (void)channel, (void)channels, (void)count, (void)inputs, (void)to;
}

#endif
