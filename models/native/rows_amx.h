/* Steps in bfloat16, with sums in float32, on processors with AMX. Part of rows.c.
 *
 * A row is (pixels, slots): pixel-major, so that 16 pixels by 32 slots are a matrix tile as they
 * lie in memory, wherever in the row they begin. Channels have slots: groups that the network's
 * convolutions have are filled up to 16, all of them to a multiple of 32; slots without a channel
 * are zero, and so are their weights: what is not finite there spreads to the channels of a pair's
 * other group. A product is 32 pixels by 32 outputs (a pair of tiles), summed in four tile registers
 * over 32 inputs at a time.
 */

enum { HALF_MARGIN = 4 }; /* pixels of zeros at each end of a row; no kernel's radius is greater */

#include "amx.h"

#if defined(PCSR_HAS_AMX)

#include <sys/syscall.h>
#include <unistd.h>

/* Whether the system lets this process use tile registers: it has to be asked. */
int32_t pcsr_rows_has_half(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

static inline int32_t half_pairs(const Step *step) { return step->outputs / 32; }

/* Row y of a ring, at pixel 0. */
static uint16_t *half_row(const Part *part, int32_t index, int32_t y) {
    const Buffer *buffer = &part->buffer[index];
    const int64_t size = (int64_t)part->half_stride * buffer->channels;
    uint16_t *first = (uint16_t *)(part->arena + buffer->first);
    return first + y % buffer->rows * size + HALF_MARGIN * buffer->channels;
}

static void clear_margin(const Part *part, uint16_t *row, int32_t slots, int32_t first,
                         int32_t count) {
    for (int32_t x = part->w; x < part->w + HALF_MARGIN; x++)
        memset(row + (int64_t)x * slots + first, 0, sizeof(*row) * count);
}

/* A row of floats (C, stride) in half precision; `slots` are the channels' places. */
static void to_half(const Part *part, const Step *step, int32_t y) {
    const int32_t source = step->source[0].buffer, target = step->target;
    const int32_t channels = part->buffer[source].channels, slots = part->buffer[target].channels;
    const int32_t end = last_column(part, target);
    const float *from = row_of(part, source, y);
    uint16_t *to = half_row(part, target, y);
    for (int32_t x = first_column(part, target); x < end; x += LANES)
        for (int32_t c = 0; c < channels; c++) {
            const __m512 values = _mm512_load_ps(from + (int64_t)c * part->stride + x);
            uint16_t rounded[LANES];
            _mm256_storeu_si256((__m256i *)rounded, (__m256i)_mm512_cvtneps_pbh(values));
            for (int32_t i = 0; i < LANES && x + i < end; i++)
                to[(int64_t)(x + i) * slots + step->slots[c]] = rounded[i];
        }
    if (end == part->w) clear_margin(part, to, slots, 0, slots);
}

ALWAYS_INLINE __m512 activated(const Step *step, __m512 y, int32_t slot) {
    const __m512 zero = _mm512_setzero_ps();
    if (step->activation == RELU) return _mm512_max_ps(zero, y); /* nan stays */
    if (step->activation == SLOPES)
        return _mm512_mask_mul_ps(y, _mm512_cmp_ps_mask(y, zero, _CMP_LT_OQ), y,
                                  _mm512_loadu_ps(step->slope + slot));
    return y;
}

ALWAYS_INLINE __m512 widened(__m256i half) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}

/* Sums (2, 16 pixels, 16 outputs) of a pair to the step's output, at pixels x to x + count. */
static void finish_half(const Part *part, const Step *step, int32_t pair, int32_t x,
                        int32_t count, const float *sums, const uint16_t *added, uint16_t *to,
                        float *out) {
    const int32_t slot = 32 * pair, slots = step->outputs;
    for (int32_t i = 0; i < count; i++) {
        __m512 low = _mm512_load_ps(sums + 16 * i), high = _mm512_load_ps(sums + 256 + 16 * i);
        if (added) {
            const uint16_t *at = added + (int64_t)(x + i) * slots + slot;
            low = _mm512_add_ps(low, widened(_mm256_loadu_si256((const __m256i *)at)));
            high = _mm512_add_ps(high, widened(_mm256_loadu_si256((const __m256i *)(at + 16))));
        }
        low = activated(step, low, slot);
        high = activated(step, high, slot + 16);
        if (to) {
            store_half(to + (int64_t)(x + i) * slots + slot, low, high);
        } else {
            /* `slots` of the last step: (first channel, channels) of each 16 slots. */
            const int32_t *place = step->slots + 4 * pair;
            float *pixel = out + (int64_t)(x + i) * part->buffer[part->steps].channels;
            _mm512_mask_storeu_ps(pixel + place[0], (1u << place[1]) - 1, low);
            _mm512_mask_storeu_ps(pixel + place[2], (1u << place[3]) - 1, high);
        }
    }
}

/* A pair of output tiles along a row. `groups` above 1: it reads only the inputs of its number. */
static void run_half(const Part *part, const Step *step, int32_t y, int32_t pair,
                     const void **rows) {
    int32_t count = 0;
    int64_t products = 0;
    for (int32_t i = 0; i < step->sources; i++) {
        const Source *source = &step->source[i];
        const int32_t radius = source->size / 2;
        products += (step->groups > 1 ? 1 : source->channels / 32) * source->size * source->size;
        for (int32_t dy = -radius; dy <= radius; dy++) {
            const int is_inside = y + dy >= 0 && y + dy < part->h;
            const uint16_t *row = is_inside ? half_row(part, source->buffer, y + dy)
                                            : (const uint16_t *)part->zeros +
                                                  HALF_MARGIN * source->channels;
            rows[count++] = row - radius * source->channels +
                            (step->groups > 1 ? 32 * pair : 0);
        }
    }
    const uint8_t *first_weight = (const uint8_t *)step->weight + pair * products * 2048;
    const float *bias = step->bias + 32 * pair;
    const int is_last = step->target == part->steps;
    const uint16_t *added = step->added < 0 ? NULL : half_row(part, step->added, y);
    uint16_t *to = is_last ? NULL : half_row(part, step->target, y);
    float *out = !is_last ? NULL
        : part->out + ((int64_t)(y - part->first_out) * part->out_stride + part->left) *
                          part->buffer[part->steps].channels;
    const int32_t end = last_column(part, step->target);
    for (int32_t x = first_column(part, step->target); x < end; x += 32) {
        float sums[4 * 256] __attribute__((aligned(64)));
        const uint8_t *weight = first_weight;
        const int is_wide = end - x > 16;
        int32_t r = 0;
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + 16, 0);
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + 16, 0);
        for (int32_t i = 0; i < step->sources; i++) {
            const int32_t size = step->source[i].size, slots = step->source[i].channels;
            const int32_t blocks = step->groups > 1 ? 1 : slots / 32;
            for (int32_t dy = 0; dy < size; dy++) {
                const uint16_t *from = (const uint16_t *)rows[r++] + (int64_t)x * slots;
                for (int32_t dx = 0; dx < size; dx++, from += slots)
                    for (int32_t block = 0; block < blocks; block++, weight += 2048) {
                        const uint16_t *in = from + 32 * block;
                        _tile_loadd(4, in, 2 * slots);
                        _tile_loadd(6, weight, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, weight + 1024, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        if (!is_wide) continue;
                        _tile_loadd(5, in + 16 * slots, 2 * slots);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
            }
        }
        _tile_stored(0, sums, 64);
        _tile_stored(1, sums + 256, 64);
        finish_half(part, step, pair, x, smaller(16, end - x), sums, added, to, out);
        if (!is_wide) continue;
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
        finish_half(part, step, pair, x + 16, smaller(16, end - x - 16), sums + 512, added, to,
                    out);
    }
    if (!is_last && end == part->w) clear_margin(part, to, step->outputs, 32 * pair, 32);
}

#else

int32_t pcsr_rows_has_half(void) { return 0; }
static int32_t half_pairs(const Step *step) { return step->outputs / 32; }
static void to_half(const Part *part, const Step *step, int32_t y) {
    (void)part, (void)step, (void)y;
}
static void run_half(const Part *part, const Step *step, int32_t y, int32_t pair,
                     const void **rows) {
    (void)part, (void)step, (void)y, (void)pair, (void)rows;
}

#endif
