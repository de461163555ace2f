/* What rows.c computes, and positions, in float32 and in plain C: for every processor, as wide as its vectors are.
 *
 * The loops over a row are written for the compiler to make vectors of them: nothing in them branches, and sums may be
 * taken in any order. Work is shared out by OpenMP in pieces whose sums are added in a fixed order: a result depends
 * neither on the number of threads nor on which of them was faster.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LOG2_E 1.44269504f
#define LANES 16
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* 2^x by whole powers and a Taylor polynomial; relative error below 3e-7. It is at least 2^-126, from 2^127.5 on
 * infinite, and of a NaN, which no comparison holds for, one. */
static inline float power_of_2(float x) {
    x = x < -126.0f ? -126.0f : x;
    x = x > 128.0f ? 128.0f : x;
    float whole = rintf(x), f = x - whole;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    int32_t bits = ((int32_t)whole + 127) * (1 << 23);
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_2(-LOG2_E * x)); }

/* ---- RMSNorm ---------------------------------------------------------------------------------------------------- */

static inline float reciprocal_rms(int64_t D, const float *x, float eps) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    return 1.0f / sqrtf(squares / D + eps);
}

/* dx = gradient of x * r * weight with r = 1 / rms(x), and dweight += that of the weight; dx may be dy. */
static inline void norm_gradient(int64_t D, const float *x, float r, const float *weight, const float *dy, float *dx,
                                 float *dweight) {
    float dots = 0;
    for (int64_t d = 0; d < D; d++) {
        float gu = dy[d] * x[d] * r;
        dweight[d] += gu;
        dots += gu * weight[d];
    }
    float along = dots / D * r;
    for (int64_t d = 0; d < D; d++) dx[d] = r * (dy[d] * weight[d] - x[d] * along);
}

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
 * `piece_rows` rows, whose sum is the gradient of the weight. */
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

/* ---- positions -------------------------------------------------------------------------------------------------- */

/* A row of qkv holds H queries, G keys and G values of K channels each. The queries and keys are normalised, unless the
 * norms' weights are null, and turned by their position, the row's number modulo T; the values are taken as they are. */
typedef struct {
    int64_t N, T, H, G, K;
    const float *qkv, *q_norm, *k_norm;
    float eps;
    const float *cosines, *sines; /* T rows of K, whose halves are the same */
} Heads;

void position_forward(const Heads *a, float *q, float *k, float *v) {
    int64_t H = a->H, G = a->G, K = a->K, half = K / 2;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < a->N; n++) {
        const float *cosines = a->cosines + n % a->T * K, *sines = a->sines + n % a->T * K;
        const float *x = a->qkv + n * (H + 2 * G) * K;
        for (int64_t head = 0; head < H + G; head++, x += K) {
            const float *weight = head < H ? a->q_norm : a->k_norm;
            float *y = head < H ? q + (n * H + head) * K : k + (n * G + head - H) * K;
            if (weight) {
                float r = reciprocal_rms(K, x, a->eps);
                for (int64_t i = 0; i < half; i++) {
                    float first = x[i] * r * weight[i], second = x[i + half] * r * weight[i + half];
                    y[i] = first * cosines[i] - second * sines[i];
                    y[i + half] = second * cosines[i] + first * sines[i];
                }
            } else {
                for (int64_t i = 0; i < half; i++) {
                    float first = x[i], second = x[i + half];
                    y[i] = first * cosines[i] - second * sines[i];
                    y[i + half] = second * cosines[i] + first * sines[i];
                }
            }
        }
        memcpy(v + n * G * K, x, G * K * sizeof(float));
    }
}

/* `parts` has two rows of K for every `piece_rows` rows, whose sums are the gradients of the norms' weights. */
void position_backward(const Heads *a, int64_t piece_rows, const float *dq, const float *dk, const float *dv, float *dqkv,
                       float *parts) {
    int64_t H = a->H, G = a->G, K = a->K, half = K / 2, pieces = (a->N + piece_rows - 1) / piece_rows;
#pragma omp parallel for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces; piece++) {
        memset(parts + piece * 2 * K, 0, 2 * K * sizeof(float));
        for (int64_t n = piece * piece_rows; n < MIN(a->N, (piece + 1) * piece_rows); n++) {
            const float *cosines = a->cosines + n % a->T * K, *sines = a->sines + n % a->T * K;
            const float *x = a->qkv + n * (H + 2 * G) * K;
            float *dx = dqkv + n * (H + 2 * G) * K;
            for (int64_t head = 0; head < H + G; head++, x += K, dx += K) {
                const float *weight = head < H ? a->q_norm : a->k_norm;
                const float *dy = head < H ? dq + (n * H + head) * K : dk + (n * G + head - H) * K;
                for (int64_t i = 0; i < half; i++) { /* turned back */
                    dx[i] = dy[i] * cosines[i] + dy[i + half] * sines[i];
                    dx[i + half] = dy[i + half] * cosines[i] - dy[i] * sines[i];
                }
                float *part = parts + (piece * 2 + (head >= H)) * K;
                if (weight) norm_gradient(K, x, reciprocal_rms(K, x, a->eps), weight, dx, dx, part);
            }
            memcpy(dx, dv + n * G * K, G * K * sizeof(float));
        }
    }
}

/* ---- cross-entropy ---------------------------------------------------------------------------------------------- */

/* A NaN leaves it alone, and so it shows in the powers. */
static inline float maximum(int64_t V, const float *row) {
    float lanes[LANES], most = -INFINITY;
    for (int64_t i = 0; i < LANES; i++) lanes[i] = most;
    int64_t v = 0;
    for (; v + LANES <= V; v += LANES)
        for (int64_t i = 0; i < LANES; i++) lanes[i] = row[v + i] > lanes[i] ? row[v + i] : lanes[i];
    for (; v < V; v++) most = row[v] > most ? row[v] : most;
    for (int64_t i = 0; i < LANES; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

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
        float most = maximum(V, row), total = 0;
        for (int64_t v = 0; v < V; v++) total += powers[v] = power_of_2((row[v] - most) * LOG2_E);
        losses[n] = (most + logf(total) - row[targets[n]]) * scales[n];
        float factor = scales[n] / total;
        for (int64_t v = 0; v < V; v++) powers[v] *= factor;
        powers[targets[n]] -= scales[n];
    }
}
