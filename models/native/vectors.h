/* Vectors of this processor's width, and how many sums its registers hold. */

#ifndef PCSR_VECTORS_H
#define PCSR_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* TILE outputs by VECTORS vectors of pixels are summed at once: of the registers, so many hold
 * sums; the others hold a vector of each kind of pixels and a weight. */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, VECTORS = 2, TILE = 13 }; /* 26 of 32 */
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, VECTORS = 2, TILE = 6 }; /* 12 of 16 */
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, VECTORS = 4, TILE = 6 }; /* 24 of 32 */
#else
enum { VECTOR_BYTES = 16, VECTORS = 2, TILE = 6 };
#endif
enum { LANES = VECTOR_BYTES / 4, GROUP = LANES * VECTORS };

typedef float vec __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));
typedef float unaligned_vec __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(VECTOR_BYTES), aligned(VECTOR_BYTES)));

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* weight * x + sum, rounded once where the processor can. By name: a compiler that is left to make
 * one of a product and a sum may do so in the tile of one width and not in that of another, and a
 * pixel's value would depend on where the image is divided. */
ALWAYS_INLINE vec multiply_add(float weight, vec x, vec sum) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(weight), (__m512)x, (__m512)sum);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(weight), (__m256)x, (__m256)sum);
#elif defined(__aarch64__)
    return (vec)vfmaq_n_f32((float32x4_t)sum, (float32x4_t)x, weight);
#else
    return weight * x + sum;
#endif
}

/* Keeps a vector in a register. With few of them, GCC would rather read memory again in each
 * multiply_add, and then reading takes longer than adding. */
#if defined(__AVX__) && !defined(__AVX512F__)
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v) ((void)0)
#endif

static inline vec relu(vec v) {
    /* nan is not below zero and stays. */
    return (vec)((ivec)v & ~(ivec)(v < (vec){0}));
}

/* The elements of two vectors by turns: of their first halves, and of their second ones. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#if defined(__AVX512F__)
#define ZIP_FIRST(a, b) \
    SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_SECOND(a, b) \
    SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif defined(__AVX__)
#define ZIP_FIRST(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_SECOND(a, b) SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define ZIP_FIRST(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define ZIP_SECOND(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#endif

/* `count` vectors, a power of two, to as many: each round moves a bit of an element's place from
 * the vector's number to the lane. As many rounds as bits of `count` give the first elements of
 * all vectors, then the second ones, and so on. */
ALWAYS_INLINE void zip(vec *v, const int count) {
    vec zipped[LANES];
#pragma GCC unroll 4
    for (int round = 1; round < count; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < count / 2; i++) {
            zipped[2 * i] = ZIP_FIRST(v[i], v[i + count / 2]);
            zipped[2 * i + 1] = ZIP_SECOND(v[i], v[i + count / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < count; i++) v[i] = zipped[i];
    }
}

static inline int32_t tiles(int32_t outputs) { return (outputs + TILE - 1) / TILE; }

static inline void *allocate(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* CASES(F) for each size of a tile: `case N: F(N); break;` */
#if defined(__AVX512F__)
#define CASES(F) \
    CASE(F, 1) CASE(F, 2) CASE(F, 3) CASE(F, 4) CASE(F, 5) CASE(F, 6) CASE(F, 7) CASE(F, 8) \
    CASE(F, 9) CASE(F, 10) CASE(F, 11) CASE(F, 12) CASE(F, 13)
#else
#define CASES(F) CASE(F, 1) CASE(F, 2) CASE(F, 3) CASE(F, 4) CASE(F, 5) CASE(F, 6)
#endif
#define CASE(F, N) \
    case N: \
        F(N); \
        break;

#endif
