/* An emulation of the intrinsics of AVX-512 BF16 that the C kernels use, and with EMULATED_TILES of AMX: slow, lane
 * by lane, as specified in Intel's Intrinsics Guide. Included in place of the compiler's header, it lets the tests
 * of the kernels run on any processor. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define VECTOR(type, name, bytes) typedef type name __attribute__((vector_size(bytes), may_alias))
VECTOR(float, __m512, 64);
VECTOR(int64_t, __m512i, 64);
VECTOR(uint16_t, __m512bh, 64);
VECTOR(int64_t, __m256i, 32);
VECTOR(uint16_t, __m256bh, 32);
VECTOR(uint32_t, words16, 64);
VECTOR(uint16_t, halves32, 64);
VECTOR(uint16_t, halves16, 32);
typedef uint16_t __mmask16;
typedef uint32_t __mmask32;

#define EACH(count) for (int i = 0; i < (count); i++)
#define INLINE static inline __attribute__((always_inline, unused))

/* Memory. Lanes outside a mask are neither read nor written. */
INLINE __m512i _mm512_loadu_si512(const void *at) {
    __m512i x;
    memcpy(&x, at, sizeof x);
    return x;
}
INLINE __m512i _mm512_load_si512(const void *at) { return *(const __m512i *)at; }
INLINE void _mm512_storeu_si512(void *at, __m512i x) { memcpy(at, &x, sizeof x); }
INLINE void _mm512_stream_si512(void *at, __m512i x) { *(__m512i *)at = x; }
INLINE void _mm512_store_si512(void *at, __m512i x) { *(__m512i *)at = x; }
INLINE void _mm256_storeu_si256(__m256i *at, __m256i x) { memcpy(at, &x, sizeof x); }
INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float *at) {
    __m512 x = {0};
    EACH(16) if (mask >> i & 1) x[i] = at[i];
    return x;
}
INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const uint16_t *at) {
    halves32 x = {0};
    EACH(32) if (mask >> i & 1) x[i] = at[i];
    return (__m512i)x;
}
INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const uint16_t *at) {
    halves16 x = {0};
    EACH(16) if (mask >> i & 1) x[i] = at[i];
    return (__m256i)x;
}
INLINE void _mm512_mask_storeu_ps(float *at, __mmask16 mask, __m512 x) {
    EACH(16) if (mask >> i & 1) at[i] = x[i];
}
INLINE void _mm256_mask_storeu_epi16(uint16_t *at, __mmask16 mask, __m256i x) {
    EACH(16) if (mask >> i & 1) at[i] = ((halves16)x)[i];
}

/* Arithmetic of float32. */
INLINE __m512 _mm512_set1_ps(float x) { return x - (__m512){0}; }
INLINE __m512 _mm512_max_ps(__m512 a, __m512 b) { /* b if either is NaN */
    return (__m512)(((words16)a & (words16)(a > b)) | ((words16)b & ~(words16)(a > b)));
}
INLINE __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return (__m512)(((words16)a & (words16)(a < b)) | ((words16)b & ~(words16)(a < b)));
}
INLINE __m512 _mm512_mask_mov_ps(__m512 else_, __mmask16 mask, __m512 a) {
    EACH(16) else_[i] = mask >> i & 1 ? a[i] : else_[i];
    return else_;
}
INLINE __m512 _mm512_roundscale_ps(__m512 a, int to_whole) { /* 0: to the nearest integer, ties to even */
    EACH(16) a[i] = nearbyintf(ldexpf(a[i], to_whole >> 4)) / (1 << (to_whole >> 4));
    return a;
}
INLINE __m512 _mm512_scalef_ps(__m512 a, __m512 power) {
    EACH(16) a[i] = ldexpf(a[i], (int)floorf(power[i]));
    return a;
}
INLINE float _mm512_reduce_add_ps(__m512 a) {
    for (int half = 8; half; half /= 2) EACH(half) a[i] += a[i + half];
    return a[0];
}
INLINE float _mm512_reduce_max_ps(__m512 a) {
    for (int half = 8; half; half /= 2) EACH(half) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    return a[0];
}

/* Bits. */
INLINE __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
INLINE __m512i _mm512_setzero_si512(void) { return (__m512i){0}; }
INLINE __m512i _mm512_set1_epi32(int32_t x) { return (__m512i)((words16){0} + (uint32_t)x); }
INLINE __m512i _mm512_set1_epi16(int16_t x) { return (__m512i)((halves32){0} + (uint16_t)x); }
INLINE __m512i _mm512_add_epi16(__m512i a, __m512i b) { return (__m512i)((halves32)a + (halves32)b); }
INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
INLINE __m512i _mm512_slli_epi32(__m512i a, unsigned by) { return (__m512i)((words16)a << by); }
INLINE __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return (__m512i)__builtin_convertvector((halves16)a, words16);
}
INLINE __m512i _mm512_permutex2var_epi16(__m512i a, __m512i from, __m512i b) {
    return (__m512i)__builtin_shuffle((halves32)a, (halves32)b, (halves32)from);
}
INLINE __m512i _mm512_permutexvar_epi16(__m512i from, __m512i a) {
    return (__m512i)__builtin_shuffle((halves32)a, (halves32)from);
}
INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int which) { /* two quarters of a, then two of b */
    __m512i x;
    EACH(8) x[i] = (i < 4 ? a : b)[2 * (which >> i / 2 * 2 & 3) + i % 2];
    return x;
}
INLINE __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    words16 from = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    return (__m512i)__builtin_shuffle((words16)a, (words16)b, from);
}
INLINE __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    words16 from = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    return (__m512i)__builtin_shuffle((words16)a, (words16)b, from);
}
INLINE __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return __builtin_shuffle(a, b, (__m512i){0, 8, 2, 10, 4, 12, 6, 14});
}
INLINE __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return __builtin_shuffle(a, b, (__m512i){1, 9, 3, 11, 5, 13, 7, 15});
}

/* bfloat16: rounded to nearest, ties to even. Subnormal numbers are kept; the processor takes them for 0. */
INLINE __m256bh _mm512_cvtneps_pbh(__m512 a) {
    words16 bits = (words16)a, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    words16 nan = (words16)(a != a);
    return __builtin_convertvector((rounded & ~nan) | (quiet & nan), __m256bh);
}
INLINE __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    words16 high = (words16){0} + 0xffff0000;
    sum += (__m512)((words16)a & high) * (__m512)((words16)b & high);
    return sum + (__m512)((words16)a << 16) * (__m512)((words16)b << 16);
}
INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    __m512bh x;
    __m256bh halves[2] = {_mm512_cvtneps_pbh(low), _mm512_cvtneps_pbh(high)};
    memcpy(&x, halves, sizeof x);
    return x;
}

/* AMX: eight tiles of up to 16 rows of up to 64 bytes a thread. Using one that is not configured aborts, as on the
 * processor. */
#undef __AMX_TILE__
#undef __AMX_BF16__
#ifdef EMULATED_TILES
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#include <stdlib.h>
#include <unistd.h>
/* The kernel grants the permission to use them, or refuses. */
#ifndef REFUSED_TILES
#define syscall(number, what, which) (0 & (number) & (what) & (which))
#else
#define syscall(number, what, which) (-1 | (number) | (what) | (which))
#endif
typedef struct {
    int rows, bytes;
    uint16_t at[16][32];
} Tile;
static __thread Tile tiles[8];

INLINE void _tile_loadconfig(const void *config) {
    const uint8_t *sizes = config;
    for (int t = 0; t < 8; t++) tiles[t] = (Tile){.rows = sizes[48 + t], .bytes = sizes[16 + 2 * t] + 256 * sizes[17 + 2 * t]};
    if (sizes[0] != 1) abort();
}
INLINE void _tile_release(void) { memset(tiles, 0, sizeof tiles); }
INLINE Tile *tile_number(int number) {
    if (!tiles[number].rows || !tiles[number].bytes) abort();
    return tiles + number;
}
INLINE void _tile_zero(int number) { memset(tile_number(number)->at, 0, sizeof tiles[0].at); }
INLINE void _tile_loadd(int number, const void *from, int64_t row) {
    Tile *tile = tile_number(number);
    EACH(tile->rows) memcpy(tile->at[i], (const char *)from + i * row, tile->bytes);
}
INLINE void _tile_stored(int number, void *to, int64_t row) {
    Tile *tile = tile_number(number);
    EACH(tile->rows) memcpy((char *)to + i * row, tile->at[i], tile->bytes);
}
INLINE void _tile_dpbf16ps(int sums, int left, int right) { /* sums[m][n] += left[m][2p..] right[p][2n..] */
    Tile *C = tile_number(sums), *A = tile_number(left), *B = tile_number(right);
    for (int m = 0; m < C->rows; m++)
        for (int p = 0; p < A->bytes / 4; p++) {
            __m512 c;
            __m512bh b, a = (__m512bh)((words16){0} + (A->at[m][2 * p] | (uint32_t)A->at[m][2 * p + 1] << 16));
            memcpy(&c, C->at[m], sizeof c);
            memcpy(&b, B->at[p], sizeof b);
            c = _mm512_dpbf16_ps(c, a, b);
            memcpy(C->at[m], &c, sizeof c);
        }
}
#endif
