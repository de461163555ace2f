/* What a training step computes row by row between the matrix products of its layers, forward and backward:
 * normalisation, SwiGLU and cross-entropy. Activations are bfloat16, everything is summed in float32.
 *
 * Work is shared out by OpenMP in pieces whose sums are added in a fixed order: a result depends neither on the number
 * of threads nor on which of them was faster.
 */
#include "vectors.h"

#define ROWS_AHEAD 4

/* ---- RMSNorm ---------------------------------------------------------------------------------------------------- */

/* y = s * rstd * weight with s = x + added (added and s may be null: s is x) and rstd = 1 / rms(s), of N rows of D. */
void rms_norm_forward(int64_t N, int64_t D, const bf16 *x, const bf16 *added, const float *weight, float eps, bf16 *s,
                      bf16 *y, float *rstd) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const bf16 *row = x + n * D;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += LANES) {
            __mmask16 mask = first(D - d);
            ask_for(row + d, ROWS_AHEAD * D);
            __m512 v = load(row + d, mask);
            if (added) {
                ask_for(added + n * D + d, ROWS_AHEAD * D);
                /* What later layers read is the rounded sum: normalise that. */
                store(s + n * D + d, mask, _mm512_add_ps(v, load(added + n * D + d, mask)));
                v = load(s + n * D + d, mask);
            }
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        if (added) row = s + n * D;
        float r = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / D + eps);
        rstd[n] = r;
        for (int64_t d = 0; d < D; d += LANES) {
            __mmask16 mask = first(D - d);
            __m512 scaled = _mm512_mul_ps(load(row + d, mask), _mm512_set1_ps(r));
            store(y + n * D + d, mask, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, weight + d)));
        }
    }
}

/* ds = dsum + gradient of the norm; dsum, which comes past the norm, may be null. `parts` has a row of D floats for
 * every `piece_rows` rows; the first becomes the gradient of the weight. */
void rms_norm_backward(int64_t N, int64_t D, int64_t piece_rows, const bf16 *s, const float *weight, const float *rstd,
                       const bf16 *dy, const bf16 *dsum, bf16 *ds, float *parts) {
    int64_t pieces = (N + piece_rows - 1) / piece_rows;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; piece++) {
        float *part = parts + piece * D;
        memset(part, 0, D * sizeof(float));
        for (int64_t n = piece * piece_rows; n < MIN(N, (piece + 1) * piece_rows); n++) {
            __m512 r = _mm512_set1_ps(rstd[n]), dots = _mm512_setzero_ps();
            for (int64_t d = 0; d < D; d += LANES) {
                __mmask16 mask = first(D - d);
                ask_for(s + n * D + d, ROWS_AHEAD * D);
                ask_for(dy + n * D + d, ROWS_AHEAD * D);
                if (dsum) ask_for(dsum + n * D + d, ROWS_AHEAD * D);
                __m512 unit = _mm512_mul_ps(load(s + n * D + d, mask), r), g = load(dy + n * D + d, mask);
                __m512 w = _mm512_maskz_loadu_ps(mask, weight + d), gu = _mm512_mul_ps(g, unit);
                store_floats(part + d, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, part + d), gu));
                dots = _mm512_fmadd_ps(gu, w, dots);
            }
            __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dots) / D);
            for (int64_t d = 0; d < D; d += LANES) {
                __mmask16 mask = first(D - d);
                __m512 unit = _mm512_mul_ps(load(s + n * D + d, mask), r), g = load(dy + n * D + d, mask);
                __m512 w = _mm512_maskz_loadu_ps(mask, weight + d);
                __m512 value = _mm512_mul_ps(r, _mm512_fnmadd_ps(unit, mean, _mm512_mul_ps(g, w)));
                if (dsum) value = _mm512_add_ps(value, load(dsum + n * D + d, mask));
                store(ds + n * D + d, mask, value);
            }
        }
    }
    add_up(pieces, D, parts);
}

/* ---- SwiGLU ----------------------------------------------------------------------------------------------------- */

/* y = silu(gate) * up; each of the N rows of x holds F gates and then F ups. */
void swiglu_forward(int64_t N, int64_t F, const bf16 *x, bf16 *y) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const bf16 *gate = x + 2 * n * F, *up = gate + F;
        for (int64_t f = 0; f < F; f += LANES) {
            __mmask16 mask = first(F - f);
            ask_for(gate + f, 2 * F);
            ask_for(up + f, 2 * F);
            ask_to_write(y + n * F + f, F);
            __m512 g = load(gate + f, mask);
            store(y + n * F + f, mask, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), load(up + f, mask)));
        }
    }
}

void swiglu_backward(int64_t N, int64_t F, const bf16 *x, const bf16 *dy, bf16 *dx) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const bf16 *gate = x + 2 * n * F, *up = gate + F;
        bf16 *dgate = dx + 2 * n * F, *dup = dgate + F;
        for (int64_t f = 0; f < F; f += LANES) {
            __mmask16 mask = first(F - f);
            ask_for(gate + f, 2 * F);
            ask_for(up + f, 2 * F);
            ask_for(dy + n * F + f, F);
            ask_to_write(dgate + f, 2 * F);
            ask_to_write(dup + f, 2 * F);
            __m512 g = load(gate + f, mask), u = load(up + f, mask), d = load(dy + n * F + f, mask);
            __m512 share = sigmoid(g), silu = _mm512_mul_ps(g, share);
            /* silu' = share + silu (1 - share) */
            __m512 slope = _mm512_add_ps(share, _mm512_fnmadd_ps(silu, share, silu));
            store(dgate + f, mask, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
            store(dup + f, mask, _mm512_mul_ps(d, silu));
        }
    }
}

/* ---- cross-entropy ---------------------------------------------------------------------------------------------- */

/* Loss of N rows of V logits in nats, times scales, and its gradient. A row of scale 0 counts for nothing, and its
 * target is not read; of a target that is no word the loss is NaN. */
void cross_entropy(int64_t N, int64_t V, const bf16 *logits, const int64_t *targets, const float *scales, float *losses,
                   bf16 *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const bf16 *row = logits + n * V;
        bf16 *drow = gradient + n * V;
        int is_word = targets[n] >= 0 && targets[n] < V;
        if (scales[n] == 0 || !is_word) {
            losses[n] = scales[n] == 0 ? 0 : NAN;
            memset(drow, 0, V * sizeof(bf16));
            continue;
        }
        float *power = scratch(ROUND_UP(V, LANES) * sizeof(float));
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t v = 0; v < V; v += LANES) {
            __mmask16 mask = first(V - v);
            /* In this order a NaN leaves the maximum alone, and shows in the powers. */
            highest = _mm512_mask_max_ps(highest, mask, load(row + v, mask), highest);
        }
        float most = _mm512_reduce_max_ps(highest);
        __m512 shift = _mm512_set1_ps(-most * LOG2_E), log2_e = _mm512_set1_ps(LOG2_E);
        for (int64_t v = 0; v < V; v += LANES) {
            __mmask16 mask = first(V - v);
            __m512 p = exp2_16(_mm512_fmadd_ps(load(row + v, mask), log2_e, shift));
            sum = _mm512_mask_add_ps(sum, mask, sum, p);
            _mm512_store_ps(power + v, p);
        }
        float total = _mm512_reduce_add_ps(sum), target;
        uint32_t bits = (uint32_t)row[targets[n]] << 16;
        memcpy(&target, &bits, sizeof target);
        losses[n] = (most + logf(total) - target) * scales[n];
        power[targets[n]] -= total;
        __m512 factor = _mm512_set1_ps(scales[n] / total);
        for (int64_t v = 0; v < V; v += LANES)
            store(drow + v, first(V - v), _mm512_mul_ps(_mm512_load_ps(power + v), factor));
    }
}
