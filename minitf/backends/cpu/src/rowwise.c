/* The row-wise kernels of a training step, forward and backward: RMSNorm, SwiGLU and cross-entropy.
 *
 * OpenMP shares out the work in pieces whose sums are added in a fixed order: a result depends neither on the number of
 * threads nor on which of them was faster.
 */
#include "vec.h"

#define ROWS_AHEAD 4

/* ---- RMSNorm ---------------------------------------------------------------------------------------------------- */

/* y = s * rstd * weight with s = x + added (`added` may be null: then s is x and is not written) and rstd = 1 /
 * rms(s), of N rows of D. */
void rms_norm_forward(int64_t N, int64_t D, const scalar *x, const scalar *added, const float *weight, float eps,
                      scalar *s, scalar *y, float *rstd) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const scalar *row = x + n * D;
        vec squares = all(0);
        for (int64_t d = 0; d < D; d += LANES) {
            lanes some = first(D - d);
            prefetch(row + d, ROWS_AHEAD * D);
            vec v = load(row + d, some);
            if (added) {
                prefetch(added + n * D + d, ROWS_AHEAD * D);
                /* Later layers read the rounded sum: normalise that. */
                store(s + n * D + d, some, v + load(added + n * D + d, some));
                v = load(s + n * D + d, some);
            }
            squares += v * v;
        }
        if (added) row = s + n * D;
        float r = rstd[n] = 1.0f / sqrtf(sum_of(squares) / D + eps);
        for (int64_t d = 0; d < D; d += LANES) {
            lanes some = first(D - d);
            store(y + n * D + d, some, load(row + d, some) * r * load_floats(weight + d, some));
        }
    }
}

/* ds = dsum + gradient of the norm; dsum, the gradient of s from elsewhere, may be null. `parts` has a row of D
 * floats for every `piece_rows` rows; the first becomes the gradient of the weight. */
void rms_norm_backward(int64_t N, int64_t D, int64_t piece_rows, const scalar *s, const float *weight,
                       const float *rstd, const scalar *dy, const scalar *dsum, scalar *ds, float *parts) {
    int64_t pieces = (N + piece_rows - 1) / piece_rows;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; piece++) {
        float *part = parts + piece * D;
        memset(part, 0, D * sizeof(float));
        for (int64_t n = piece * piece_rows; n < MIN(N, (piece + 1) * piece_rows); n++) {
            const scalar *row = s + n * D, *g = dy + n * D;
            float r = rstd[n];
            vec dots = all(0);
            for (int64_t d = 0; d < D; d += LANES) {
                lanes some = first(D - d);
                prefetch(row + d, ROWS_AHEAD * D);
                prefetch(g + d, ROWS_AHEAD * D);
                if (dsum) prefetch(dsum + n * D + d, ROWS_AHEAD * D);
                vec dweight = load(row + d, some) * r * load(g + d, some);
                store_floats(part + d, some, load_floats(part + d, some) + dweight);
                dots += dweight * load_floats(weight + d, some);
            }
            float mean = sum_of(dots) / D;
            for (int64_t d = 0; d < D; d += LANES) {
                lanes some = first(D - d);
                vec unit = load(row + d, some) * r, w = load_floats(weight + d, some);
                vec gradient = r * (load(g + d, some) * w - unit * mean);
                if (dsum) gradient += load(dsum + n * D + d, some);
                store(ds + n * D + d, some, gradient);
            }
        }
    }
    add_rows(pieces, D, parts);
}

/* ---- SwiGLU ----------------------------------------------------------------------------------------------------- */

/* y = silu(gate) * up; each of the N rows of x holds F gates and then F ups. */
void swiglu_forward(int64_t N, int64_t F, const scalar *x, scalar *y) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const scalar *gate = x + 2 * n * F, *up = gate + F;
        for (int64_t f = 0; f < F; f += LANES) {
            lanes some = first(F - f);
            prefetch(gate + f, 2 * F);
            prefetch(up + f, 2 * F);
            prefetch_to_write(y + n * F + f, F);
            vec g = load(gate + f, some);
            store(y + n * F + f, some, g * sigmoid(g) * load(up + f, some));
        }
    }
}

void swiglu_backward(int64_t N, int64_t F, const scalar *x, const scalar *dy, scalar *dx) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const scalar *gate = x + 2 * n * F, *up = gate + F;
        scalar *dgate = dx + 2 * n * F, *dup = dgate + F;
        for (int64_t f = 0; f < F; f += LANES) {
            lanes some = first(F - f);
            prefetch(gate + f, 2 * F);
            prefetch(up + f, 2 * F);
            prefetch(dy + n * F + f, F);
            prefetch_to_write(dgate + f, 2 * F);
            prefetch_to_write(dup + f, 2 * F);
            vec g = load(gate + f, some), u = load(up + f, some), d = load(dy + n * F + f, some);
            vec share = sigmoid(g), silu = g * share;
            store(dgate + f, some, d * u * (share + (silu - silu * share))); /* silu' = share + silu (1 - share) */
            store(dup + f, some, d * silu);
        }
    }
}

/* ---- cross-entropy ---------------------------------------------------------------------------------------------- */

/* The loss of N rows of V logits in nats, times `scales`, and its gradient. A row of scale 0 counts for nothing, and
 * its target is not read; a target outside the vocabulary makes the loss NaN. */
void cross_entropy(int64_t N, int64_t V, const scalar *logits, const int64_t *targets, const float *scales,
                   float *losses, scalar *gradient) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n++) {
        const scalar *row = logits + n * V;
        scalar *drow = gradient + n * V;
        int is_word = targets[n] >= 0 && targets[n] < V;
        if (scales[n] == 0 || !is_word) {
            losses[n] = scales[n] == 0 ? 0 : NAN;
            memset(drow, 0, V * sizeof *drow);
            continue;
        }
        float *exps = WORD_SCALARS == 1 ? (float *)drow : scratch(V * sizeof *exps);
        vec highest = all(-INFINITY), sums = all(0);
        for (int64_t v = 0; v < V; v += LANES) /* in this order NaN does not become the maximum, but shows in the sum */
            highest = maximum(within(load(row + v, first(V - v)), 0, V - v, -INFINITY), highest);
        float most = max_of(highest), shift = most * LOG2_E;
        for (int64_t v = 0; v < V; v += LANES) {
            lanes some = first(V - v);
            vec e = exp2_of(load(row + v, some) * LOG2_E - shift);
            sums += within(e, 0, V - v, 0);
            store_floats(exps + v, some, e);
        }
        float total = sum_of(sums), factor = scales[n] / total;
        losses[n] = (most + logf(total) - load(row + targets[n], first(1))[0]) * scales[n];
        exps[targets[n]] -= total;
        for (int64_t v = 0; v < V; v += LANES) {
            lanes some = first(V - v);
            store(drow + v, some, load_floats(exps + v, some) * factor);
        }
    }
}
