/* Packing: rows of activations as operands of the microkernel. R and C, rows and columns, are multiples of PANEL. */
#pragma once
#include "gemm_microkernel.h"

/* Words along the rows' axis, of one row (float32) or of two next to each other (bfloat16: (a[c], b[c]); b may be
 * null, for zeros). The next panel of columns goes `panel` words further. */
static inline void pack_words(const scalar *a, const scalar *b, int64_t count, word *to, int64_t panel) {
#ifdef BFLOAT16
    static const uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    __m512i low = _mm512_loadu_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t c = 0; c < count; c += PANEL, to += panel) {
        __mmask32 mask = count - c >= PANEL ? 0xffffffff : (1u << (count - c)) - 1;
        __m512i x = _mm512_maskz_loadu_epi16(mask, a + c), y = _mm512_maskz_loadu_epi16(b ? mask : 0, b + c);
        _mm512_store_si512(to, _mm512_permutex2var_epi16(x, low, y));
        _mm512_store_si512(to + LANES, _mm512_permutex2var_epi16(x, high, y));
    }
#else
    (void)b;
    for (int64_t c = 0; c < count; c += PANEL, to += panel) memcpy(to, a + c, PANEL * sizeof *to);
#endif
}

/* LANES rows of LANES words, `row` words apart, transposed into rows `to_row` words apart. */
static inline void transpose(const word *x, int64_t row, word *to, int64_t to_row) {
#if AVX512
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
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[i * to_row + j] = x[j * row + i];
#endif
}

/* The right operand of products that sum over the rows of x. */
static inline void panels_over_rows(const scalar *x, int64_t R, int64_t C, word *to) {
    int64_t words = R / WORD_SCALARS;
    for (int64_t r = 0; r < R; r += WORD_SCALARS)
        pack_words(x + r * C, x + (r + WORD_SCALARS - 1) * C, C, to + r / WORD_SCALARS * PANEL, words * PANEL);
}

/* The right operand of products that sum over the columns of x. */
static inline void panels_over_columns(const scalar *x, int64_t R, int64_t C, word *to) {
    int64_t words = C / WORD_SCALARS;
    for (int64_t r = 0; r < R; r += LANES)
        for (int64_t p = 0; p < words; p += LANES)
            transpose((const word *)(x + r * C) + p, words, to + (r / PANEL * words + p) * PANEL + r % PANEL, PANEL);
}

/* The left operand made of PANEL columns of a panel, of `words` words `panel_row` apart. AMX reads rows, so for AMX
 * they are transposed into `to`, as blocks of 16 words: from longer rows, which evict each other from the L1 cache,
 * it takes half as long again. */
static inline Left left_of(const word *panel, int64_t panel_row, int64_t words, word *to) {
#if AMX
    for (int64_t p = 0; p < words; p += LANES)
        for (int64_t m = 0; m < PANEL; m += LANES)
            transpose(panel + p * panel_row + m, panel_row, to + p * PANEL + m * LANES, LANES);
    return blocks_as_left(to);
#else
    (void)words, (void)to;
    return (Left){panel, 1, LANES * panel_row, panel_row};
#endif
}
