/* Vectors, and the precision of activations. Every kernel is written once, with these.
 *
 * `vec` holds LANES floats: 16 with AVX-512, elsewhere as many as a register of the processor, by the compiler's vector
 * extension. `scalar` is the type of activations: bfloat16 with -DBFLOAT16 (it needs AVX-512 BF16), else float32.
 * Arithmetic and sums are always float32. A `word` is what matrix products multiply at once: a pair of bfloat16, or a
 * float; both take 4 bytes.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))
#define LOG2_E 1.44269504f
#define CACHE_LINE 64 /* bytes */

#if defined(BFLOAT16) || defined(__AVX512F__)
#define AVX512 1
#define LANES 16
#elif defined(__AVX__)
#define AVX512 0
#define LANES 8
#else
#define AVX512 0
#define LANES 4
#endif

#if AVX512
#include <immintrin.h>
typedef __m512 vec;
typedef __mmask16 lanes; /* some lanes of a vector */
#else
typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int64_t lanes; /* their number: always the first ones */
#endif

typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
static inline vec load_vec(const float *at) { return *(const unaligned_vec *)at; }
static inline void store_vec(float *at, vec x) { *(unaligned_vec *)at = x; }

#if AVX512

/* The first `count` lanes, at most all. */
static inline lanes first(int64_t count) { return count >= LANES ? 0xffff : (lanes)((1u << count) - 1); }

static inline vec load_floats(const float *at, lanes some) { return _mm512_maskz_loadu_ps(some, at); }

/* A masked store takes several times as long as a whole one, even where the mask has all lanes. */
static inline void store_floats(float *at, lanes some, vec x) {
    if (some == 0xffff)
        store_vec(at, x);
    else
        _mm512_mask_storeu_ps(at, some, x);
}

static inline vec all(float x) { return _mm512_set1_ps(x); }

/* max(a, b) and min(a, b); b if either is NaN. */
static inline vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec minimum(vec a, vec b) { return _mm512_min_ps(a, b); }

static inline float sum_of(vec x) { return _mm512_reduce_add_ps(x); }
static inline float max_of(vec x) { return _mm512_reduce_max_ps(x); }

/* x in lanes [from, to), `other` elsewhere; mostly all lanes are within. */
static inline vec within(vec x, int64_t from, int64_t to, float other) {
    if (from <= 0 && to >= LANES) return x;
    lanes some = first(MAX(to, 0)) & (lanes)~first(MAX(from, 0));
    return _mm512_mask_mov_ps(all(other), some, x);
}
#else
static inline lanes first(int64_t count) { return MIN(count, LANES); }

static inline vec load_floats(const float *at, lanes some) {
    if (some == LANES) return load_vec(at);
    vec x = {0};
    memcpy(&x, at, some * sizeof *at);
    return x;
}

static inline void store_floats(float *at, lanes some, vec x) {
    if (some == LANES)
        store_vec(at, x);
    else
        memcpy(at, &x, some * sizeof *at);
}

static inline vec all(float x) { return x - (vec){0}; }
static inline vec choose(int_vec of_a, vec a, vec b) { return (vec)(((int_vec)a & of_a) | ((int_vec)b & ~of_a)); }
static inline vec maximum(vec a, vec b) { return choose(a > b, a, b); }
static inline vec minimum(vec a, vec b) { return choose(a < b, a, b); }

static inline float sum_of(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline float max_of(vec x) {
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = MAX(most, x[i]);
    return most;
}

static inline vec within(vec x, int64_t from, int64_t to, float other) {
    if (from <= 0 && to >= LANES) return x;
    static const int32_t NUMBERS[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    int_vec number;
    memcpy(&number, NUMBERS, sizeof number);
    return choose((number >= (int32_t)from) & (number < (int32_t)to), x, all(other));
}
#endif

#ifdef BFLOAT16
typedef uint16_t scalar;
typedef uint32_t word;
#define WORD_SCALARS 2

static inline vec load(const scalar *at, lanes some) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, at)), 16));
}

static inline void store(scalar *at, lanes some, vec x) {
    __m256i rounded = (__m256i)_mm512_cvtneps_pbh(x);
    if (some == 0xffff)
        _mm256_storeu_si256((__m256i *)at, rounded);
    else
        _mm256_mask_storeu_epi16(at, some, rounded);
}
#else
typedef float scalar, word;
#define WORD_SCALARS 1
#define load load_floats
#define store store_floats
#endif

/* 2^x: 2 to a whole power times a Taylor polynomial, relative error below 3e-7. Of NaN it is NaN; where the result
 * would be below 2^-126, that or less. */
static inline vec exp2_of(vec x) {
#if AVX512
    x = maximum(all(-160.0f), x);
    vec whole = _mm512_roundscale_ps(x, 0);
#else
    x = minimum(all(128.0f), maximum(all(-126.0f), x));
    int_vec power = __builtin_convertvector(x + 256.5f, int_vec) - 256; /* positive, so that truncation rounds down */
    vec whole = __builtin_convertvector(power, vec);
#endif
    vec f = x - whole, p = all(1.54035304e-4f);
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
#if AVX512
    return _mm512_scalef_ps(p, whole);
#else
    return p * (vec)((power + 127) << 23);
#endif
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp2_of(minimum(all(160.0f), x * -LOG2_E))); }

static inline float sum_of_squares(const scalar *x, int64_t count) {
    vec squares = all(0);
    for (int64_t i = 0; i < count; i += LANES) {
        vec v = load(x + i, first(count - i));
        squares += v * v;
    }
    return sum_of(squares);
}

/* Prefetch the scalar `ahead` of `at`. Hardware prefetchers miss rows that are read in pieces, or several arrays at
 * once: without this, SwiGLU took three times as long. */
static inline void prefetch(const scalar *at, int64_t ahead) { __builtin_prefetch(at + ahead); }
static inline void prefetch_to_write(scalar *at, int64_t ahead) { __builtin_prefetch(at + ahead, 1); }

/* Add rows of `count` floats to the first row, in their order. */
static inline void add_rows(int64_t rows, int64_t count, float *x) {
    for (int64_t row = 1; row < rows; row++)
        for (int64_t i = 0; i < count; i++) x[i] += x[row * count + i];
}

/* Memory of the calling thread, kept for its next call: `scratch` for what the threads of a call share (its first
 * thread asks for it), `private_scratch` for each thread's own. */
static inline void *kept_memory(size_t bytes, void **memory, size_t *held) {
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

#define THREAD_MEMORY(name)                        \
    static inline void *name(size_t bytes) {       \
        static __thread void *memory;              \
        static __thread size_t held;               \
        return kept_memory(bytes, &memory, &held); \
    }
THREAD_MEMORY(scratch)
THREAD_MEMORY(private_scratch)
