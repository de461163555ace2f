/* Matrix products of bfloat16 in blocks of 32 by 32, in pieces that stay in the cache: what linear.c, feed_forward.c
 * and muon.c share. */
#pragma once
#include "panels.h"
#include <omp.h>

#define BLOCK (PANEL * PANEL)
#define WORDS 128             /* summed at a time in the gradient of weights: a panel, 16 KB, stays in the L1 cache */
#define ELEMENTS_AT_ONCE 4096 /* a thread takes of element-wise work */

typedef struct {
    float at[BLOCK] __attribute__((aligned(64)));
} Block;

/* PANEL rows from n on of x, N rows of K scalars, as a left operand; zeros after the last row. They are copied because
 * tiles from long rows take half as long again: the rows evict each other from the L1 cache. */
static inline Left strip_of(const scalar *x, int64_t N, int64_t K, int64_t n, scalar *to) {
    for (int64_t k = 0; k < K; k += PANEL)
        for (int64_t i = 0; i < PANEL; i++) {
            __m512i values = _mm512_setzero_si512();
            if (n + i < N) values = _mm512_loadu_si512(x + (n + i) * K + k);
            _mm512_store_si512(to + k * PANEL + i * PANEL, values);
        }
    return blocks_as_left((const word *)to);
}

/* A block of a product. */
static inline void product_block(Left left, const word *B, int64_t words, float *C, int64_t C_row, int add) {
    for (int m = 0; m < PANEL; m += TILE) tile(from_row(left, m), B, 0, words, C + m * C_row, C_row, add);
}

/* 32 scalars: the rounded halves of a row, or a half of one row and of the next. */
static inline __m512i round_halves(vec low, vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* The same of row i of a block. */
static inline __m512i round_row(const Block *block, int64_t i) {
    return round_halves(load_vec(block->at + i * PANEL), load_vec(block->at + i * PANEL + LANES));
}

/* 16 columns of two rows as words. */
static inline __m512i words_of(vec row, vec next) {
    static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), round_halves(row, next));
}

/* Whether each thread packs for itself the operand that all share. A cache line from another core takes longer than
 * packing it again: with two threads a weight gradient of 256 by 256 took 0.46 ms instead of 0.3. With many threads
 * the repeated work would cost more. */
static inline int packs_for_itself(void) { return AMX && omp_get_num_threads() <= 4; }

/* Pack weights (R rows of C) as the right operand of products that sum over their columns or rows: by all threads of a
 * parallel region together, or by each in a place of its own. */
static inline void pack_weights(const scalar *weights, int64_t R, int64_t C, int over_columns, int alone, word *to) {
    int64_t parts = alone ? 1 : omp_get_num_threads(), part = alone ? 0 : omp_get_thread_num(), blocks = R / PANEL;
    int64_t to_row = blocks * (part + 1) / parts * PANEL;
    for (int64_t r = blocks * part / parts * PANEL; r < to_row; r += over_columns ? PANEL : 2) {
        if (over_columns)
            panels_over_columns(weights + r * C, PANEL, C, to + r * C / 2);
        else
            pack_words(weights + r * C, weights + (r + 1) * C, C, to + r / 2 * PANEL, R / 2 * PANEL);
    }
    if (!alone) {
#pragma omp barrier
    }
}

/* `lines` cache lines that are read next, `stride` bytes apart: some are prefetched with every block of products. */
typedef struct {
    const char *at;
    int64_t lines, stride, at_once;
} Prefetch;

static inline Prefetch prefetch_of(const void *from, int64_t lines, int64_t stride, int64_t blocks) {
    return (Prefetch){from, lines, stride, (lines + blocks - 1) / blocks};
}

static inline void prefetch_some(Prefetch *next) {
    for (int64_t i = MIN(next->at_once, next->lines); i > 0; i--, next->lines--, next->at += next->stride)
        __builtin_prefetch(next->at, 0, 2);
}
