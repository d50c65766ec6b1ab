/* Matrix tiles of bfloat16 on processors with AMX: what all kernels that use them share.
 *
 * A tile is 16 rows of 64 bytes: of a left factor 16 pixels by 32 inputs, of a right factor 16
 * pairs of inputs by 16 outputs, of sums in float32 16 pixels by 16 outputs.
 */

#ifndef PCSR_AMX_H
#define PCSR_AMX_H

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#define PCSR_HAS_AMX 1

#include <immintrin.h>

typedef struct {
    uint8_t before[64];
} HalfState;

/* Configures the tile registers; other libraries use them, too, and find them as they were. */
static inline void begin_half(HalfState *state) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int32_t t = 0; t < 8; t++) {
        config.row_bytes[t] = 64;
        config.rows[t] = 16;
    }
    _tile_storeconfig(state->before);
    _tile_loadconfig(&config);
}

static inline void end_half(const HalfState *state) {
    if (state->before[0])
        _tile_loadconfig(state->before);
    else
        _tile_release();
}

/* Two vectors of floats as 32 numbers in half precision. */
ALWAYS_INLINE void store_half(uint16_t *to, __m512 low, __m512 high) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

#else

typedef struct {
    uint8_t nothing;
} HalfState;

static inline void begin_half(HalfState *state) { (void)state; }
static inline void end_half(const HalfState *state) { (void)state; }

#endif
#endif
