/* The feed-forward layer, down (silu(gate z) * up z), forward and backward: 32 rows at a time, so that of what lies between
 * its products only gates and ups leave the cache, which the way back needs. D and F are multiples of 32.
 */
#include "products.h"

typedef struct {
    float at[PANEL * PANEL] __attribute__((aligned(64)));
} Block;

/* y = x + down (silu(gate z) * up z) of N rows of D; `gate_up` are the weights of F gates and F ups, `kept` gets their values,
 * 2 F a row. x may be null. */
void feed_forward(int64_t N, int64_t D, int64_t F, const bf16 *z, const bf16 *x, const bf16 *gate_up, const bf16 *down,
                  bf16 *kept, bf16 *y) {
    uint32_t *shared = scratch(3 * D * F * sizeof(bf16));
#pragma omp parallel
    {
        Block gates, ups;
        int each = each_for_itself();
        bf16 *strip = own_scratch(((D + F) * PANEL + each * 3 * D * F) * sizeof(bf16)), *hidden = strip + D * PANEL;
        uint32_t *gate_up_T = each ? (uint32_t *)(hidden + F * PANEL) : shared, *down_T = gate_up_T + D * F;
        put_panels(gate_up, 2 * F, D, 1, each, gate_up_T);
        put_panels(down, D, F, 1, each, down_T);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            int64_t count = MIN(PANEL, N - n);
            Left left = strip_of(z, N, D, n, strip);
            Ahead ahead = ahead_of(z + (n + PANEL) * D, n + PANEL < N ? D : 0, LINE, F / PANEL);
            for (int64_t f = 0; f < F; f += PANEL) {
                product_block(left, gate_up_T + f * D / 2, D / 2, gates.at, PANEL, 0);
                product_block(left, gate_up_T + (F + f) * D / 2, D / 2, ups.at, PANEL, 0);
                ask_some(&ahead);
                for (int64_t i = 0; i < PANEL; i++) {
                    __m512 g0 = _mm512_load_ps(gates.at + i * PANEL), g1 = _mm512_load_ps(gates.at + i * PANEL + LANES);
                    __m512 u0 = _mm512_load_ps(ups.at + i * PANEL), u1 = _mm512_load_ps(ups.at + i * PANEL + LANES);
                    if (i < count) {
                        _mm512_stream_si512((void *)(kept + (n + i) * 2 * F + f), both_halves(g0, g1));
                        _mm512_stream_si512((void *)(kept + (n + i) * 2 * F + F + f), both_halves(u0, u1));
                    }
                    g0 = _mm512_mul_ps(_mm512_mul_ps(g0, sigmoid(g0)), u0);
                    g1 = _mm512_mul_ps(_mm512_mul_ps(g1, sigmoid(g1)), u1);
                    _mm512_store_si512(hidden + f * PANEL + i * PANEL, both_halves(g0, g1));
                }
            }
            for (int64_t d = 0; d < D; d += PANEL) {
                product_block(turned_left((uint32_t *)hidden), down_T + d * F / 2, F / 2, gates.at, PANEL, 0);
                for (int64_t i = 0; i < count; i++) {
                    __m512 low = _mm512_load_ps(gates.at + i * PANEL), high = _mm512_load_ps(gates.at + i * PANEL + LANES);
                    if (x) {
                        low = _mm512_add_ps(low, load(x + (n + i) * D + d, 0xffff));
                        high = _mm512_add_ps(high, load(x + (n + i) * D + d + LANES, 0xffff));
                    }
                    _mm512_storeu_si512(y + (n + i) * D + d, both_halves(low, high));
                }
            }
        }
        end_tiles();
    }
}

/* From dy to dz, that of z without what comes past the layer, and what the weights' gradients are products of, as panels
 * for `weight_gradient`: `dkept`, that of gates and ups, and `hidden`, silu(gate) * up. */
void feed_forward_backward(int64_t N, int64_t D, int64_t F, const bf16 *dy, const bf16 *kept, const bf16 *gate_up,
                           const bf16 *down, uint32_t *dkept, uint32_t *hidden, bf16 *dz) {
    uint32_t *shared = scratch(3 * D * F * sizeof(bf16));
    int64_t P = ROUND_UP(N, PANEL) / 2;
#pragma omp parallel
    {
        Block sums;
        int each = each_for_itself();
        bf16 *strip = own_scratch(((D + 2 * F) * PANEL + each * 3 * D * F) * sizeof(bf16)), *turned = strip + D * PANEL;
        uint32_t *gate_up_2 = each ? (uint32_t *)(turned + 2 * F * PANEL) : shared, *down_2 = gate_up_2 + D * F;
        put_panels(gate_up, 2 * F, D, 0, each, gate_up_2);
        put_panels(down, D, F, 0, each, down_2);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            Left left = strip_of(dy, N, D, n, strip);
            int64_t from = n / 2 / PAIRS * PAIRS, pairs = MIN(PAIRS, P - from);
            Ahead ahead = ahead_of(kept + (n + PANEL) * 2 * F, n + PANEL < N ? 2 * F : 0, LINE, F / PANEL);
            for (int64_t f = 0; f < F; f += PANEL) {
                product_block(left, down_2 + f * D / 2, D / 2, sums.at, PANEL, 0);
                ask_some(&ahead);
                for (int64_t i = 0; i < PANEL; i += 2) {
                    __m512 dg[2][2], du[2][2], h[2][2]; /* of two rows two halves */
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) {
                        int row = k / 2, half = k % 2;
                        const bf16 *at = kept + MIN(N - 1, n + i + row) * 2 * F + f + half * LANES;
                        __m512 g = load(at, 0xffff), u = load(at + F, 0xffff);
                        __m512 d = _mm512_load_ps(sums.at + (i + row) * PANEL + half * LANES);
                        __m512 share = sigmoid(g), silu = _mm512_mul_ps(g, share);
                        /* silu' = share + silu (1 - share) */
                        __m512 slope = _mm512_add_ps(share, _mm512_fnmadd_ps(silu, share, silu));
                        dg[row][half] = _mm512_mul_ps(_mm512_mul_ps(d, u), slope);
                        du[row][half] = _mm512_mul_ps(d, silu);
                        h[row][half] = _mm512_mul_ps(silu, u);
                    }
                    int64_t here = ((n + i) / 2 - from) * PANEL;
                    uint32_t *gate_at = dkept + from * 2 * F + f * pairs + here, *up_at = gate_at + F * pairs;
                    uint32_t *hidden_at = hidden + from * F + f * pairs + here;
#pragma GCC unroll 2
                    for (int k = 0; k < 2; k++) {
                        _mm512_store_si512(turned + (f + i + k) * PANEL, both_halves(dg[k][0], dg[k][1]));
                        _mm512_store_si512(turned + (F + f + i + k) * PANEL, both_halves(du[k][0], du[k][1]));
                        _mm512_store_si512(gate_at + k * LANES, pairs_of(dg[0][k], dg[1][k]));
                        _mm512_store_si512(up_at + k * LANES, pairs_of(du[0][k], du[1][k]));
                        _mm512_store_si512(hidden_at + k * LANES, pairs_of(h[0][k], h[1][k]));
                    }
                }
            }
            for (int64_t d = 0; d < D; d += PANEL) {
                product_block(turned_left((uint32_t *)turned), gate_up_2 + d * F, F, sums.at, PANEL, 0);
                for (int64_t i = 0; i < MIN(PANEL, N - n); i++)
                    _mm512_storeu_si512(dz + (n + i) * D + d, both_halves(_mm512_load_ps(sums.at + i * PANEL),
                                                                        _mm512_load_ps(sums.at + i * PANEL + LANES)));
            }
        }
        end_tiles();
    }
}
