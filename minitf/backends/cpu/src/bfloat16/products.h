/* Matrix products of bfloat16 with sums in float32, in pieces that stay in the cache. */
#pragma once
#include "tiles.h"
#include <omp.h>

#define PAIRS 128 /* of rows at a time in a gradient: a panel of so many, 16 KB, stays in the nearest cache */

/* Two rows of `count` values as pairs, a value of each: to[c] = (a[c], b[c]); b may be null, for zeros. */
static inline void pair_rows(const bf16 *a, const bf16 *b, int64_t count, uint32_t *to, int64_t panel) {
    static const uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low = _mm512_loadu_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < count; c += PANEL, to += panel) {
        __mmask32 mask = count - c >= PANEL ? 0xffffffff : (1u << (count - c)) - 1;
        __m512i x = _mm512_maskz_loadu_epi16(mask, a + c), y = _mm512_maskz_loadu_epi16(b ? mask : 0, b + c);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(x, low, y));
        _mm512_store_si512(to + LANES, _mm512_permutex2var_epi16(x, high, y));
    }
}

/* Right operand of products over the rows of x (R of C values, both multiples of 32). */
static inline void panels_over_rows(const bf16 *x, int64_t R, int64_t C, uint32_t *to) {
    for (int64_t r = 0; r < R; r += 2) pair_rows(x + r * C, x + (r + 1) * C, C, to + r / 2 * PANEL, R / 2 * PANEL);
}

/* 16 rows of 16 pairs, `row` pairs apart, turned into 16 rows of 16 pairs, `to_row` apart. */
static inline void transpose(const uint32_t *x, int64_t row, uint32_t *to, int64_t to_row) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(x + i * row);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
        a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
        a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(to + i * to_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_store_si512(to + (i + 4) * to_row, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_store_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_store_si512(to + (i + 12) * to_row, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

/* Right operand of products over the columns of x (R of C values, both multiples of 32). */
static inline void panels_over_columns(const bf16 *x, int64_t R, int64_t C, uint32_t *to) {
    for (int64_t r = 0; r < R; r += LANES)
        for (int64_t p = 0; p < C / 2; p += LANES)
            transpose((const uint32_t *)(x + r * C) + p, C / 2,
                      to + (r / PANEL * (C / 2) + p) * PANEL + r % PANEL, PANEL);
}

/* What `tile` takes for its left operand, from 32 columns of a panel, of `pairs` pairs `panel_row` apart. For AMX, which
 * reads rows, they are turned, into `to`: 32 rows of 16 pairs behind each other. From rows that are longer than that it
 * takes half as long again, where they do not stay in the nearest cache. */
static inline Left left_of(const uint32_t *panel, int64_t panel_row, int64_t pairs, uint32_t *to) {
#if AMX
    for (int64_t p = 0; p < pairs; p += LANES)
        for (int64_t m = 0; m < PANEL; m += LANES)
            transpose(panel + p * panel_row + m, panel_row, to + p * PANEL + m * LANES, LANES);
    return turned_left(to);
#else
    (void)pairs, (void)to;
    return (Left){panel, 1, LANES * panel_row, panel_row};
#endif
}

/* 32 rows from n on of x, N rows of K values (a multiple of 32), as a left operand in the same order; zeros behind the last
 * row. Copied, because tiles from long rows take half as long again: they do not stay in the nearest cache. */
static inline Left strip_of(const bf16 *x, int64_t N, int64_t K, int64_t n, bf16 *to) {
    for (int64_t k = 0; k < K; k += PANEL)
        for (int64_t i = 0; i < PANEL; i++) {
            __m512i values = _mm512_setzero_si512();
            if (n + i < N) values = _mm512_loadu_si512(x + (n + i) * K + k);
            _mm512_store_si512(to + k * PANEL + i * PANEL, values);
        }
    return turned_left((const uint32_t *)to);
}

/* 32 rows by 32 columns of a product. */
static inline void product_block(Left left, const uint32_t *B, int64_t pairs, float *C, int64_t C_row, int add) {
    for (int m = 0; m < PANEL; m += TILE) tile(from_row(left, m), B, 0, pairs, C + m * C_row, C_row, add);
}

/* 32 values, rounded: the halves of a row, or a half of one row and of the next. */
static inline __m512i both_halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* 16 columns of two rows as pairs. */
static inline __m512i pairs_of(__m512 row, __m512 next) {
    static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), both_halves(row, next));
}

/* Whether each thread makes for itself what all need. A line of the cache that comes from another core takes longer than
 * making it anew: with two threads a weight gradient of 256 by 256 took 0.46 ms instead of 0.3. With many it would be made
 * too often. */
static inline int each_for_itself(void) { return AMX && omp_get_num_threads() <= 4; }

/* Right operand of products with weights (R of C values), over their columns or rows, by all threads of a parallel region, or
 * by each into a place of its own. */
static inline void put_panels(const bf16 *weights, int64_t R, int64_t C, int over_columns, int each, uint32_t *to) {
    int64_t parts = each ? 1 : omp_get_num_threads(), part = each ? 0 : omp_get_thread_num(), blocks = R / PANEL;
    for (int64_t r = blocks * part / parts * PANEL; r < blocks * (part + 1) / parts * PANEL; r += over_columns ? PANEL : 2) {
        if (over_columns)
            panels_over_columns(weights + r * C, PANEL, C, to + r * C / 2);
        else
            pair_rows(weights + r * C, weights + (r + 1) * C, C, to + r / 2 * PANEL, R / 2 * PANEL);
    }
    if (!each) {
#pragma omp barrier
    }
}

/* `lines` lines that are read next, `step` bytes from each other: some are asked for with every block of products. */
typedef struct {
    const char *at;
    int64_t lines, step, some;
} Ahead;

static inline Ahead ahead_of(const void *from, int64_t lines, int64_t step, int64_t blocks) {
    return (Ahead){from, lines, step, (lines + blocks - 1) / blocks};
}

static inline void ask_some(Ahead *ahead) {
    for (int64_t i = MIN(ahead->some, ahead->lines); i > 0; i--, ahead->lines--, ahead->at += ahead->step)
        __builtin_prefetch(ahead->at, 0, 2);
}
