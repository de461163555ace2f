/* Vectors of 16 numbers of a processor with AVX-512 BF16, for all that is here. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define LINE 64 /* bytes of the cache at a time */
#define LOG2_E 1.44269504f
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

typedef uint16_t bf16;

static inline __mmask16 first(int64_t count) { return count >= LANES ? 0xffff : (__mmask16)((1u << count) - 1); }

/* Add rows of `count` values to the first of them, in their order. */
static inline void add_up(int64_t rows, int64_t count, float *x) {
    for (int64_t row = 1; row < rows; row++)
        for (int64_t i = 0; i < count; i++) x[i] += x[row * count + i];
}

static inline __m512 load(const bf16 *at, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at)), 16));
}

/* Storing some of the lanes takes several times as long as storing all, even where the mask has them all. */
static inline void store(bf16 *at, __mmask16 mask, __m512 value) {
    __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
    if (mask == 0xffff)
        _mm256_storeu_si256((__m256i *)at, half);
    else
        _mm256_mask_storeu_epi16(at, mask, half);
}

static inline void store_floats(float *at, __mmask16 mask, __m512 value) {
    if (mask == 0xffff)
        _mm512_storeu_ps(at, value);
    else
        _mm512_mask_storeu_ps(at, mask, value);
}

/* 2^x, by whole powers and a Taylor polynomial; relative error below 3e-7. Of a NaN it is one: in this order the maximum
 * leaves it alone. */
static inline __m512 exp2_16(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.54035304e-4f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.33335581e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

static inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 power = exp2_16(_mm512_min_ps(_mm512_set1_ps(160.0f), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E))));
    return _mm512_div_ps(one, _mm512_add_ps(one, power));
}

/* Asks for what lies so many values behind `at`, to be there when it is needed. Where rows are read in pieces, or several
 * arrays at once, the processor does not see it coming: SwiGLU took three times as long without. */
static inline void ask_for(const bf16 *at, int64_t ahead) { __builtin_prefetch(at + ahead); }
static inline void ask_to_write(bf16 *at, int64_t ahead) { __builtin_prefetch(at + ahead, 1); }

/* Memory of the calling thread, kept for the next call: one piece for what all threads of a call share, one of its own. */
static void *kept_memory(size_t bytes, void **memory, size_t *held) {
    if (bytes > *held) {
        free(*memory);
        *held = ROUND_UP(bytes, 4096);
        *memory = aligned_alloc(64, *held);
        if (!*memory) {
            perror("minitf's C kernels");
            abort();
        }
    }
    return *memory;
}

static inline void *scratch(size_t bytes) {
    static __thread void *memory;
    static __thread size_t held;
    return kept_memory(bytes, &memory, &held);
}

static inline void *own_scratch(size_t bytes) {
    static __thread void *memory;
    static __thread size_t held;
    return kept_memory(bytes, &memory, &held);
}
