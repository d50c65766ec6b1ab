/* A layer on a group of pixels: a product in tiles that the registers hold. */

#ifndef PCSR_LAYERS_H
#define PCSR_LAYERS_H

#include "vectors.h"

typedef struct {
    int32_t inputs, outputs;
    const float *weight; /* tiles of `tiles(outputs)`; of each, inputs by its outputs */
    const float *bias;   /* (outputs,) or null */
} Layer;

ALWAYS_INLINE void tile(
    const int count, const float *weight, const float *bias, int32_t inputs, const float *x,
    int32_t x_stride, float *y, int32_t y_stride, int with_relu) {
    vec sum[TILE][VECTORS];
    for (int o = 0; o < count; o++)
        for (int n = 0; n < VECTORS; n++) sum[o][n] = (vec){0} + (bias ? bias[o] : 0.0f);
    for (int32_t c = 0; c < inputs; c++, x += x_stride, weight += count) {
        vec in[VECTORS];
        for (int n = 0; n < VECTORS; n++) {
            in[n] = *(const vec *)(x + n * LANES);
            IN_REGISTER(in[n]);
        }
        for (int o = 0; o < count; o++)
            for (int n = 0; n < VECTORS; n++) sum[o][n] = multiply_add(weight[o], in[n], sum[o][n]);
    }
    for (int o = 0; o < count; o++)
        for (int n = 0; n < VECTORS; n++)
            *(vec *)(y + o * y_stride + n * LANES) = with_relu ? relu(sum[o][n]) : sum[o][n];
}

/* A layer on GROUP pixels: (inputs, GROUP) to (outputs, GROUP), at the given strides. */
static void apply(const Layer *layer, const float *x, int32_t x_stride, float *y,
                  int32_t y_stride, int with_relu) {
    const int32_t outputs = layer->outputs, count = tiles(outputs), inputs = layer->inputs;
    const float *weight = layer->weight;
    for (int32_t t = 0; t < count; t++) {
        const int32_t first = t * outputs / count, size = (t + 1) * outputs / count - first;
        const float *bias = layer->bias ? layer->bias + first : NULL;
        float *to = y + (int64_t)first * y_stride;
#define RUN(N) tile(N, weight, bias, inputs, x, x_stride, to, y_stride, with_relu)
        switch (size) { CASES(RUN) }
#undef RUN
        weight += (int64_t)size * inputs;
    }
}

#endif
