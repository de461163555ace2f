/* Matrix products of bfloat16 with sums in float32, in pieces that stay in the cache. */
#pragma once
#include "tiles.h"

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

/* What `tile` takes for its left operand, from a panel: 32 rows of it, of `pairs` pairs, `panel_row` apart. AMX reads
 * rows, which are written to `to`. */
static inline Left left_of(const uint32_t *panel, int64_t panel_row, int64_t pairs, uint32_t *to) {
#ifdef AMX
    for (int64_t p = 0; p < pairs; p += LANES)
        for (int64_t m = 0; m < PANEL; m += LANES)
            transpose(panel + p * panel_row + m, panel_row, to + m * pairs + p, pairs);
    return (Left){to, pairs, 1};
#else
    return (Left){panel, 1, panel_row};
#endif
}
