/* What a training step computes row by row between its matrix products, in float32 and in plain C: for every processor,
 * as wide as its vectors are.
 *
 * Work is shared out by OpenMP in pieces whose sums are added in a fixed order: a result depends neither on the number
 * of threads nor on which of them was faster.
 */
#include "numbers.h"

/* ---- RMSNorm ---------------------------------------------------------------------------------------------------- */

/* y = s * rstd * weight with s = x + added (added may be null: s is x, and not written) and rstd = 1 / rms(s), of N rows
 * of D. */
void rms_norm_forward(int64_t N, int64_t D, const float *x, const float *added, const float *weight, float eps, float *s,
                      float *y, float *rstd) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *row = x + n * D;
        if (added) {
            const float *more = added + n * D;
            float *sum = s + n * D;
            for (int64_t d = 0; d < D; d++) sum[d] = row[d] + more[d];
            row = sum;
        }
        float r = rstd[n] = reciprocal_rms(D, row, eps);
        float *out = y + n * D;
        for (int64_t d = 0; d < D; d++) out[d] = row[d] * r * weight[d];
    }
}

/* ds = dsum + gradient of the norm; dsum, which comes past the norm, may be null. `parts` has a row of D for every
 * `piece_rows` rows; the first becomes the gradient of the weight. */
void rms_norm_backward(int64_t N, int64_t D, int64_t piece_rows, const float *s, const float *weight, const float *rstd,
                       const float *dy, const float *dsum, float *ds, float *parts) {
    int64_t pieces = (N + piece_rows - 1) / piece_rows;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; piece++) {
        float *part = parts + piece * D;
        memset(part, 0, D * sizeof(float));
        for (int64_t n = piece * piece_rows; n < MIN(N, (piece + 1) * piece_rows); n++) {
            float *out = ds + n * D;
            norm_gradient(D, s + n * D, rstd[n], weight, dy + n * D, out, part);
            if (dsum)
                for (int64_t d = 0; d < D; d++) out[d] += dsum[n * D + d];
        }
    }
    add_up(pieces, D, parts);
}

/* ---- SwiGLU ----------------------------------------------------------------------------------------------------- */

/* y = silu(gate) * up; each of the N rows of x holds F gates and then F ups. */
void swiglu_forward(int64_t N, int64_t F, const float *x, float *y) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *gate = x + 2 * n * F, *up = gate + F;
        float *out = y + n * F;
        for (int64_t f = 0; f < F; f++) out[f] = gate[f] * sigmoid(gate[f]) * up[f];
    }
}

void swiglu_backward(int64_t N, int64_t F, const float *x, const float *dy, float *dx) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *gate = x + 2 * n * F, *up = gate + F, *d = dy + n * F;
        float *dgate = dx + 2 * n * F, *dup = dgate + F;
        for (int64_t f = 0; f < F; f++) {
            float share = sigmoid(gate[f]), silu = gate[f] * share;
            /* silu' = share + silu (1 - share) */
            dgate[f] = d[f] * up[f] * (share + silu * (1.0f - share));
            dup[f] = d[f] * silu;
        }
    }
}

/* ---- cross-entropy ---------------------------------------------------------------------------------------------- */

/* Loss of N rows of V logits in nats, times scales, and its gradient. A row of scale 0 counts for nothing, and its
 * target is not read; of a target that is no word the loss is NaN. */
void cross_entropy(int64_t N, int64_t V, const float *logits, const int64_t *targets, const float *scales, float *losses,
                   float *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const float *row = logits + n * V;
        float *powers = gradient + n * V;
        int is_word = targets[n] >= 0 && targets[n] < V;
        if (scales[n] == 0 || !is_word) {
            losses[n] = scales[n] == 0 ? 0 : NAN;
            memset(powers, 0, V * sizeof(float));
            continue;
        }
        float most = maximum(row, V), total = 0;
        for (int64_t v = 0; v < V; v++) total += powers[v] = power_of_2((row[v] - most) * LOG2_E);
        losses[n] = (most + logf(total) - row[targets[n]]) * scales[n];
        float factor = scales[n] / total;
        for (int64_t v = 0; v < V; v++) powers[v] *= factor;
        powers[targets[n]] -= scales[n];
    }
}
