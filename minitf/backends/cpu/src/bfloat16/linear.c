/* Products with a layer's weights, and their gradient. */
#include "products.h"

/* Whether products of activations and weights by `linear` and `feed_forward` are faster than PyTorch's. */
int has_fast_products(void) {
#if AMX
    return has_tiles;
#else
    return 0;
#endif
}

#define PIECE 4096 /* values a thread takes at a time */

/* Weights of `count` layers, of `sizes` values each, rounded and behind each other. */
void join_weights(int64_t count, const float *const *weights, const int64_t *sizes, bf16 *to) {
#pragma omp parallel firstprivate(to)
    for (int64_t i = 0; i < count; to += sizes[i++])
#pragma omp for schedule(static) nowait
        for (int64_t from = 0; from < sizes[i]; from += PIECE)
            for (int64_t k = from; k < MIN(sizes[i], from + PIECE); k += LANES) {
                __mmask16 mask = first(sizes[i] - k);
                store(to + k, mask, _mm512_maskz_loadu_ps(mask, weights[i] + k));
            }
}

/* y = x w^T of N rows of K values with weights w of M rows, or y = x w of such of K rows of M; K and M are multiples of 32. */
void linear(int64_t N, int64_t K, int64_t M, const bf16 *x, const bf16 *w, int64_t transposed, bf16 *y) {
    uint32_t *shared = scratch(K * M * sizeof(bf16));
#pragma omp parallel
    {
        float sums[PANEL * PANEL] __attribute__((aligned(64)));
        int each = each_for_itself();
        bf16 *strip = own_scratch((PANEL + each * M) * K * sizeof(bf16));
        uint32_t *right = each ? (uint32_t *)(strip + PANEL * K) : shared;
        put_panels(w, transposed ? M : K, transposed ? K : M, transposed, each, right);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            Left left = strip_of(x, N, K, n, strip);
            Ahead ahead = ahead_of(x + (n + PANEL) * K, n + PANEL < N ? K : 0, LINE, M / PANEL);
            for (int64_t m = 0; m < M; m += PANEL) {
                product_block(left, right + m * K / 2, K / 2, sums, PANEL, 0);
                ask_some(&ahead);
                for (int64_t i = 0; i < MIN(PANEL, N - n); i++)
                    _mm512_stream_si512((void*)(y + (n + i) * M + m), both_halves(_mm512_load_ps(sums + i * PANEL),
                                                                       _mm512_load_ps(sums + i * PANEL + LANES)));
            }
        }
        end_tiles();
    }
}

/* ---- the gradient of the weights -------------------------------------------------------------------------------- */

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

/* Rows of `out` (R of C values) from r, columns from c: 32 by 32, or what of it there is. */
static void put_block(Left left, const uint32_t *right, int64_t pairs, int64_t R, int64_t C, int64_t r, int64_t c, int add,
                      float *out) {
    float *at = out + r * C + c, rest[PANEL * PANEL];
    for (int64_t m = 0; m < MIN(PANEL, R - r); m += TILE, at += TILE * C) {
        if (r + m + TILE <= R && c + PANEL <= C) {
            tile(from_row(left, m), right, 0, pairs, at, C, add);
            continue;
        }
        tile(from_row(left, m), right, 0, pairs, rest, PANEL, 0);
        for (int64_t i = 0; i < MIN(TILE, R - r - m); i++)
            for (int64_t j = 0; j < MIN(PANEL, C - c); j++)
                at[i * C + j] = (add ? at[i * C + j] : 0) + rest[i * PANEL + j];
    }
}

/* out = what is there, with `add`, + x^T, of rows of R values. */
static void put_transposed(const float *x, int64_t row, int64_t R, int64_t C, int64_t add, float *out) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r += LANES)
        for (int64_t c = 0; c < C; c += LANES) {
            float block[LANES * LANES] __attribute__((aligned(64)));
            transpose((const uint32_t *)(x + c * row + r), row, (uint32_t *)block, LANES);
            for (int64_t i = 0; i < MIN(LANES, R - r); i++) {
                float *at = out + (r + i) * C + c;
                __m512 sum = _mm512_load_ps(block + i * LANES);
                if (add) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first(C - c), at));
                store_floats(at, first(C - c), sum);
            }
        }
}

/* out = dy^T x, with `add` added to what is there, of N rows of R values dy and of C values x.
 *
 * Some pairs of rows after the other: the threads make operands of one side for all, then each takes panels of the other,
 * its own, and multiplies. Where there are fewer of them than threads, several take the same, for a share of the first.
 * Vectors read panels from either side, and x is shared. AMX wants rows on the left: of the narrower side, which is shared,
 * while that of the wider one is a right operand, or is given as panels (`panels` 1: dy, 2: x), as feed_forward_backward
 * has them. Where x is on the left, the result is transposed. */
void weight_gradient(int64_t N, int64_t R, int64_t C, const bf16 *dy, const bf16 *x, int64_t panels, int64_t add, float *out) {
    int own_is_dy = panels ? panels == 1 : !AMX || R > C, transposed = AMX && own_is_dy;
    const bf16 *own = own_is_dy ? dy : x, *shared = own_is_dy ? x : dy;
    int64_t O = own_is_dy ? R : C, S = own_is_dy ? C : R, SP = ROUND_UP(S, PANEL), OP = ROUND_UP(O, PANEL);
    int64_t P = ROUND_UP((N + 1) / 2, panels ? LANES : TILE_PAIRS), units = OP / PANEL;
    int64_t shares = (omp_get_max_threads() + units - 1) / units, share = ROUND_UP((S + shares - 1) / shares, PANEL);
    uint32_t *both = scratch((2 * PAIRS * SP + transposed * SP * OP) * sizeof(uint32_t));
    float *sums = (float *)(both + 2 * PAIRS * SP);
#pragma omp parallel
    {
        uint32_t panel[PAIRS * PANEL] __attribute__((aligned(64)));
        int each = each_for_itself();
        uint32_t *mine = each ? own_scratch(PAIRS * SP * sizeof *mine) : NULL;
        begin_tiles();
        for (int64_t from = 0; from < P; from += PAIRS) {
            int64_t pairs = MIN(PAIRS, P - from), more = add || from > 0;
            /* Of two places: others may still read the operands before. */
            uint32_t *operands = each ? mine : both + from / PAIRS % 2 * PAIRS * SP;
#if AMX
            int64_t parts = each ? 1 : omp_get_num_threads(), part = each ? 0 : omp_get_thread_num();
            for (int64_t s = SP / PANEL * part / parts * PANEL; s < SP / PANEL * (part + 1) / parts * PANEL; s += PANEL) {
                put_pairs(shared + s, N, S, MIN(PANEL, S - s), from, from + pairs, pairs, panel);
                left_of(panel, PANEL, pairs, operands + s * pairs);
            }
            if (!each) {
#pragma omp barrier
            }
#else
#pragma omp for schedule(static)
            for (int64_t p = 0; p < pairs; p++)
                put_pairs(shared, N, S, S, from + p, from + p + 1, pairs, operands + p * PANEL);
#endif
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < units * shares; i++) {
                int64_t o = i / shares * PANEL, s = i % shares * share;
                const uint32_t *here = panels ? (const uint32_t *)own + from * OP + o * pairs : panel;
                if (!panels) put_pairs(own + o, N, O, MIN(PANEL, O - o), from, from + pairs, pairs, panel);
                /* The next panel: where it lies, or the rows it is made of. */
                Ahead ahead = ahead_of(here + pairs * PANEL, 2 * pairs, LINE, SP / PANEL);
                if (!panels) ahead = ahead_of(own + 2 * from * O + o + PANEL, MIN(2 * pairs, N - 2 * from), 2 * O, SP / PANEL);
                for (int64_t to = MIN(S, s + share); s < to; s += PANEL) {
                    if (AMX) ask_some(&ahead);
                    const uint32_t *other = operands + s * pairs;
                    Left left = AMX ? turned_left(other) : left_of(other, PANEL, pairs, NULL);
                    if (transposed)
                        put_block(left, here, pairs, SP, OP, s, o, from > 0, sums);
                    else if (own_is_dy)
                        put_block(left_of(here, PANEL, pairs, NULL), other, pairs, R, C, o, s, more, out);
                    else
                        put_block(left, here, pairs, R, C, s, o, more, out);
                }
            }
        }
        end_tiles();
        if (transposed) {
#pragma omp barrier
            put_transposed(sums, OP, R, C, add, out);
        }
    }
}
