/* The feed-forward layer, down (silu(gate z) * up z), forward and backward, in bfloat16: 32 rows at a time, so that
 * between its products only gates and ups leave the cache, which the backward pass needs. D and F are multiples of
 * 32.
 */
#include "gemm_blocks.h"

/* Gates and ups of a block to `kept` (of N rows, if they are within), and silu(gate) * up to `hidden`. */
static inline void activate(const Block *gates, const Block *ups, int64_t rows, int64_t F, scalar *kept,
                            scalar *hidden) {
    for (int64_t i = 0; i < PANEL; i++) {
        vec g0 = load_vec(gates->at + i * PANEL), g1 = load_vec(gates->at + i * PANEL + LANES);
        vec u0 = load_vec(ups->at + i * PANEL), u1 = load_vec(ups->at + i * PANEL + LANES);
        if (i < rows) {
            _mm512_stream_si512((void *)(kept + i * 2 * F), round_halves(g0, g1));
            _mm512_stream_si512((void *)(kept + i * 2 * F + F), round_halves(u0, u1));
        }
        _mm512_store_si512(hidden + i * PANEL, round_halves(g0 * sigmoid(g0) * u0, g1 * sigmoid(g1) * u1));
    }
}

/* y = x + down (silu(gate z) * up z) of N rows of D; `gate_up` are the weights of F gates and F ups, and `kept`
 * receives their outputs, 2 F a row. x may be null. */
void feed_forward(int64_t N, int64_t D, int64_t F, const scalar *z, const scalar *x, const scalar *gate_up,
                  const scalar *down, scalar *kept, scalar *y) {
    word *shared = scratch(3 * D * F * sizeof(scalar));
#pragma omp parallel
    {
        Block gates, ups;
        int alone = packs_for_itself();
        scalar *strip = private_scratch(((D + F) * PANEL + alone * 3 * D * F) * sizeof(scalar));
        scalar *hidden = strip + D * PANEL;
        word *gate_up_T = alone ? (word *)(hidden + F * PANEL) : shared, *down_T = gate_up_T + D * F;
        pack_weights(gate_up, 2 * F, D, 1, alone, gate_up_T);
        pack_weights(down, D, F, 1, alone, down_T);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            int64_t rows = MIN(PANEL, N - n);
            Left left = strip_of(z, N, D, n, strip);
            Prefetch next = prefetch_of(z + (n + PANEL) * D, n + PANEL < N ? D : 0, CACHE_LINE, F / PANEL);
            for (int64_t f = 0; f < F; f += PANEL) {
                product_block(left, gate_up_T + f * D / 2, D / 2, gates.at, PANEL, 0);
                product_block(left, gate_up_T + (F + f) * D / 2, D / 2, ups.at, PANEL, 0);
                prefetch_some(&next);
                activate(&gates, &ups, rows, F, kept + n * 2 * F + f, hidden + f * PANEL);
            }
            for (int64_t d = 0; d < D; d += PANEL) {
                product_block(blocks_as_left((word *)hidden), down_T + d * F / 2, F / 2, gates.at, PANEL, 0);
                for (int64_t i = 0; i < rows; i++) {
                    vec low = load_vec(gates.at + i * PANEL), high = load_vec(gates.at + i * PANEL + LANES);
                    if (x) {
                        low += load(x + (n + i) * D + d, first(LANES));
                        high += load(x + (n + i) * D + d + LANES, first(LANES));
                    }
                    _mm512_storeu_si512(y + (n + i) * D + d, round_halves(low, high));
                }
            }
        }
        end_tiles();
    }
}

/* Where the gradients of a block of gates, its ups and its hidden values go: as rows, the left operand of dz, and as
 * words, the panels of `weight_gradient`. */
typedef struct {
    scalar *dgate, *dup;
    word *dgate_words, *dup_words, *hidden_words;
} Gradients;

/* From dhidden, PANEL rows from n on of PANEL columns, and what the forward pass kept of them, of which N - n rows
 * exist. */
static inline void activate_backward(const Block *dhidden, const scalar *kept, int64_t n, int64_t N, int64_t F,
                                     Gradients to) {
    for (int64_t i = 0; i < PANEL; i += 2) {
        vec dg[2][2], du[2][2], h[2][2]; /* two halves of two rows */
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            int row = k / 2, half = k % 2;
            const scalar *at = kept + MIN(N - 1, n + i + row) * 2 * F + half * LANES;
            vec g = load(at, first(LANES)), u = load(at + F, first(LANES));
            vec d = load_vec(dhidden->at + (i + row) * PANEL + half * LANES);
            vec share = sigmoid(g), silu = g * share;
            dg[row][half] = d * u * (share + (silu - silu * share)); /* silu' = share + silu (1 - share) */
            du[row][half] = d * silu;
            h[row][half] = silu * u;
        }
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            int64_t row = (i + k) * PANEL, words = i / 2 * PANEL + k * LANES;
            _mm512_store_si512(to.dgate + row, round_halves(dg[k][0], dg[k][1]));
            _mm512_store_si512(to.dup + row, round_halves(du[k][0], du[k][1]));
            _mm512_store_si512(to.dgate_words + words, words_of(dg[0][k], dg[1][k]));
            _mm512_store_si512(to.dup_words + words, words_of(du[0][k], du[1][k]));
            _mm512_store_si512(to.hidden_words + words, words_of(h[0][k], h[1][k]));
        }
    }
}

/* dz from dy, without the residual's share, and the operands of the weights' gradients as panels for `weight_gradient`:
 * `dkept`, the gradient of gates and ups, and `hidden`, silu(gate) * up. */
void feed_forward_backward(int64_t N, int64_t D, int64_t F, const scalar *dy, const scalar *kept, const scalar *gate_up,
                           const scalar *down, word *dkept, word *hidden, scalar *dz) {
    word *shared = scratch(3 * D * F * sizeof(scalar));
    int64_t total = ROUND_UP(N, PANEL) / 2;
#pragma omp parallel
    {
        Block sums;
        int alone = packs_for_itself();
        scalar *strip = private_scratch(((D + 2 * F) * PANEL + alone * 3 * D * F) * sizeof(scalar));
        scalar *drows = strip + D * PANEL;
        word *gate_up_panels = alone ? (word *)(drows + 2 * F * PANEL) : shared, *down_panels = gate_up_panels + D * F;
        pack_weights(gate_up, 2 * F, D, 0, alone, gate_up_panels);
        pack_weights(down, D, F, 0, alone, down_panels);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            Left left = strip_of(dy, N, D, n, strip);
            int64_t from = n / 2 / WORDS * WORDS, words = MIN(WORDS, total - from), row = (n / 2 - from) * PANEL;
            Prefetch next = prefetch_of(kept + (n + PANEL) * 2 * F, n + PANEL < N ? 2 * F : 0, CACHE_LINE, F / PANEL);
            for (int64_t f = 0; f < F; f += PANEL) {
                product_block(left, down_panels + f * D / 2, D / 2, sums.at, PANEL, 0);
                prefetch_some(&next);
                word *dgate_words = dkept + from * 2 * F + f * words + row;
                Gradients to = {drows + f * PANEL, drows + (F + f) * PANEL, dgate_words, dgate_words + F * words,
                                hidden + from * F + f * words + row};
                activate_backward(&sums, kept + f, n, N, F, to);
            }
            for (int64_t d = 0; d < D; d += PANEL) {
                product_block(blocks_as_left((word *)drows), gate_up_panels + d * F, F, sums.at, PANEL, 0);
                for (int64_t i = 0; i < MIN(PANEL, N - n); i++)
                    _mm512_storeu_si512(dz + (n + i) * D + d, round_row(&sums, i));
            }
        }
        end_tiles();
    }
}
