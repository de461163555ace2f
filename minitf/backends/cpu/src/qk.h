/* Queries, keys and values of one head: from the projection's output to the operands of attention, and their gradients
 * back. */
#pragma once
#include "panels.h"

/* Every row of qkv, one of B * T, holds H queries, G keys and G values of K scalars. */
typedef struct {
    int64_t B, T, H, G, K;
    const scalar *qkv;
    const float *q_norm, *k_norm; /* K weights each, or null: not normalised */
    float eps;
    const float *cosines, *sines; /* K a position; the second half repeats the first */
    const int32_t *starts;        /* the first key each query sees, B * T, ascending in a row; null: 0 */
    scalar *mixed;                /* B, T, H, K */
    float *log_sums;              /* B, H, T: log2 of the sum of the exponentiated scores */
} Attention;

/* Ahead of the row in use: a head's rows lie far apart, and hardware prefetchers miss them. */
#define ROWS_AHEAD 8
#define LINE_SCALARS (CACHE_LINE / (int64_t)sizeof(scalar))

/* y = rotate(x * rstd * weight) for one head at position t; returns rstd. Without `weight` x is only rotated, and
 * rstd is 1. K is even, and scalar k rotates with k + K / 2. */
static inline float norm_and_rotate(const Attention *a, const scalar *x, const float *weight, int64_t t, scalar *y) {
    int64_t half = a->K / 2;
    const float *cosines = a->cosines + t * a->K, *sines = a->sines + t * a->K;
    float rstd = weight ? 1.0f / sqrtf(sum_of_squares(x, a->K) / a->K + a->eps) : 1.0f;
    for (int64_t k = 0; k < half; k += LANES) {
        lanes some = first(half - k);
        vec u = load(x + k, some) * rstd, v = load(x + half + k, some) * rstd;
        if (weight) {
            u *= load_floats(weight + k, some);
            v *= load_floats(weight + half + k, some);
        }
        vec c = load_floats(cosines + k, some), s = load_floats(sines + k, some);
        store(y + k, some, u * c - v * s);
        store(y + half + k, some, v * c + u * s);
    }
    return rstd;
}

/* Backward of `norm_and_rotate`: dx from dy, which is overwritten; adds to dweight. */
static inline void norm_and_rotate_backward(const Attention *a, const scalar *x, const float *weight, int64_t t,
                                            float rstd, float *dy, scalar *dx, float *dweight) {
    int64_t half = a->K / 2, ahead = ROWS_AHEAD * (a->H + 2 * a->G) * a->K;
    const float *cosines = a->cosines + t * a->K, *sines = a->sines + t * a->K;
    for (int64_t k = 0; k < a->K; k += LINE_SCALARS) {
        prefetch(x + k, ahead);
        prefetch_to_write(dx + k, ahead);
    }
    vec dots = all(0);
    for (int64_t k = 0; k < half; k += LANES) {
        lanes some = first(half - k);
        vec gu = load_floats(dy + k, some), gv = load_floats(dy + half + k, some);
        vec c = load_floats(cosines + k, some), s = load_floats(sines + k, some);
        vec du = gu * c + gv * s, dv = gv * c - gu * s;
        if (weight) {
            vec u = load(x + k, some) * rstd, v = load(x + half + k, some) * rstd;
            float *wu = dweight + k, *wv = wu + half;
            store_floats(wu, some, load_floats(wu, some) + du * u);
            store_floats(wv, some, load_floats(wv, some) + dv * v);
            du *= load_floats(weight + k, some);
            dv *= load_floats(weight + half + k, some);
            dots += du * u + dv * v;
        }
        store_floats(dy + k, some, du);
        store_floats(dy + half + k, some, dv);
    }
    float mean = weight ? sum_of(dots) / a->K : 0.0f;
    for (int64_t k = 0; k < a->K; k += LANES) {
        lanes some = first(a->K - k);
        vec d = load_floats(dy + k, some);
        if (weight) d = rstd * (d - load(x + k, some) * rstd * mean);
        store(dx + k, some, d);
    }
}

/* Rows [from, from + count) of one head, `row` scalars apart, into rows of `padded` scalars, filled up with zeros:
 * copied, or with `rstd` normalised by `weight`, if that is given, and rotated. */
static void take_rows(const Attention *a, const scalar *x, int64_t row, const float *weight, int64_t from,
                      int64_t count, scalar *to, int64_t padded, float *rstd) {
    for (int64_t t = from; t < from + count; t++, to += padded) {
        if (t >= a->T) {
            memset(to, 0, padded * sizeof *to);
            continue;
        }
        if (padded > a->K) memset(to + a->K, 0, (padded - a->K) * sizeof *to);
        for (int64_t k = 0; k < a->K; k += LINE_SCALARS) prefetch(x + t * row + k, ROWS_AHEAD * row);
        if (rstd)
            rstd[t - from] = norm_and_rotate(a, x + t * row, weight, t, to);
        else
            memcpy(to, x + t * row, a->K * sizeof *to);
    }
}
