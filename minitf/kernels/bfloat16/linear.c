/* The gradient of a layer's weights. */
#include "products.h"
#include <omp.h>

#define PAIRS 128 /* of rows at a time: a panel of so many, 16 KB, stays in the nearest cache */

/* `count` columns of the pairs `from` to `to` of N rows of C values, zeros behind the last: right operand of products over
 * the rows. */
static void put_pairs(const bf16 *x, int64_t N, int64_t C, int64_t count, int64_t from, int64_t to, int64_t pairs,
                      uint32_t *panels) {
    for (int64_t p = from; p < to; p++) {
        const bf16 *row = x + 2 * p * C;
        uint32_t *at = panels + (p - from) * PANEL;
        if (2 * p >= N) {
            for (int64_t c = 0; c < count; c += PANEL) memset(at + c * pairs, 0, PANEL * sizeof *at);
            continue;
        }
        ask_for(row, 32 * C);
        ask_for(row, 33 * C);
        pair_rows(row, 2 * p + 1 < N ? row + C : NULL, count, at, pairs * PANEL);
    }
}

/* Rows of `out` (R of C values) from r, columns from c: a tile, or what of it there is. */
static void put_tile(Left left, const uint32_t *right, int64_t pairs, int64_t R, int64_t C, int64_t r, int64_t c, int add,
                     float *out) {
    float *at = out + r * C + c, rest[TILE * PANEL];
    if (r + TILE <= R && c + PANEL <= C) {
        tile(left, right, 0, pairs, at, C, add);
        return;
    }
    tile(left, right, 0, pairs, rest, PANEL, 0);
    for (int64_t i = 0; i < MIN(TILE, R - r); i++)
        for (int64_t j = 0; j < MIN(PANEL, C - c); j++)
            at[i * C + j] = (add ? at[i * C + j] : 0) + rest[i * PANEL + j];
}

/* out = dy^T x, with `add` added to what is there, of N rows of R values dy and of C values x.
 *
 * Some pairs of rows after the other: the threads turn those of x into panels for all, then each takes panels of dy,
 * turns them, and multiplies. Where there are fewer of them than threads, several take the same, for a share of x. */
void weight_gradient(int64_t N, int64_t R, int64_t C, const bf16 *dy, const bf16 *x, int64_t add, float *out) {
    int64_t P = ROUND_UP((N + 1) / 2, TILE_PAIRS), columns = ROUND_UP(C, PANEL), panels = (R + PANEL - 1) / PANEL;
    int64_t shares = (omp_get_max_threads() + panels - 1) / panels, share = ROUND_UP((C + shares - 1) / shares, PANEL);
    uint32_t *right = scratch(PAIRS * columns * sizeof(uint32_t));
#pragma omp parallel
    {
        uint32_t panel[PAIRS * PANEL] __attribute__((aligned(64))), turned[PAIRS * PANEL] __attribute__((aligned(64)));
        begin_tiles();
        for (int64_t from = 0; from < P; from += PAIRS) {
            int64_t pairs = MIN(PAIRS, P - from);
#pragma omp for schedule(static)
            for (int64_t p = 0; p < pairs; p++) put_pairs(x, N, C, C, from + p, from + p + 1, pairs, right + p * PANEL);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < panels * shares; i++) {
                int64_t r = i / shares * PANEL, c = i % shares * share;
                put_pairs(dy + r, N, R, MIN(PANEL, R - r), from, from + pairs, pairs, panel);
                Left left = left_of(panel, PANEL, pairs, turned);
                for (int64_t to = MIN(C, c + share); c < to; c += PANEL)
                    for (int64_t m = 0; m < MIN(PANEL, R - r); m += TILE)
                        put_tile(from_row(left, m), right + c * pairs, pairs, R, C, r + m, c, add || from > 0, out);
            }
        }
        end_tiles();
    }
}
