/* Queries, keys and values of one head as attention takes them, from the product that made them, and their gradients on the
 * way back there. */
#pragma once
#include "vectors.h"

/* Causal attention of queries and keys that are normalised and turned by their positions, straight from the product
 * that made them: every row of qkv, one of B * T, holds H queries, G keys and G values of K numbers. */
typedef struct {
    int64_t B, T, H, G, K;
    const bf16 *qkv;
    const float *q_norm, *k_norm; /* K weights each, or null: not normalised */
    float eps;
    const float *cosines, *sines; /* rows of K a position, of which the second half repeats the first */
    const int32_t *starts;        /* the first key each query sees, B * T, ascending in a row; null: 0 */
    bf16 *mixed;                  /* B, T, H, K */
    float *log_sums;              /* B, H, T: log2 of the sum of the powers of the scaled scores */
} Attention;

#define ROWS_AHEAD 8

typedef struct {
    int64_t columns, TP, KP; /* of qkv; T and K rounded up for the products */
} Sizes;

/* y = rotate(x * rstd * weight) for one head at one position; returns rstd. K is even; halves turn against each other. */
static inline float turned(const Attention *a, const bf16 *x, const float *weight, int64_t t, bf16 *y) {
    int64_t half = a->K / 2;
    const float *cosine = a->cosines + t * a->K, *sine = a->sines + t * a->K;
    float r = 1.0f;
    if (weight) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t k = 0; k < a->K; k += LANES) {
            __m512 v = load(x + k, first(a->K - k));
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        r = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / a->K + a->eps);
    }
    __m512 scale = _mm512_set1_ps(r);
    for (int64_t k = 0; k < half; k += LANES) {
        __mmask16 mask = first(half - k);
        __m512 u = _mm512_mul_ps(load(x + k, mask), scale), v = _mm512_mul_ps(load(x + half + k, mask), scale);
        if (weight) {
            u = _mm512_mul_ps(u, _mm512_maskz_loadu_ps(mask, weight + k));
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + half + k));
        }
        __m512 c = _mm512_maskz_loadu_ps(mask, cosine + k), s = _mm512_maskz_loadu_ps(mask, sine + k);
        store(y + k, mask, _mm512_fmsub_ps(u, c, _mm512_mul_ps(v, s)));
        store(y + half + k, mask, _mm512_fmadd_ps(v, c, _mm512_mul_ps(u, s)));
    }
    return r;
}

/* The way back of `turned`: the gradient dx of x from that of its result, g, which is overwritten; adds to dweight. */
static inline void turned_back(const Attention *a, const bf16 *x, const float *weight, int64_t t, float r, float *g,
                               bf16 *dx, float *dweight) {
    int64_t half = a->K / 2, ahead = ROWS_AHEAD * (a->H + 2 * a->G) * a->K;
    const float *cosine = a->cosines + t * a->K, *sine = a->sines + t * a->K;
    for (int64_t k = 0; k < a->K; k += 2 * LANES) {
        ask_for(x + k, ahead);
        ask_to_write(dx + k, ahead);
    }
    __m512 dots = _mm512_setzero_ps(), scale = _mm512_set1_ps(r);
    for (int64_t k = 0; k < half; k += LANES) {
        __mmask16 mask = first(half - k);
        __m512 gu = _mm512_maskz_loadu_ps(mask, g + k), gv = _mm512_maskz_loadu_ps(mask, g + half + k);
        __m512 c = _mm512_maskz_loadu_ps(mask, cosine + k), s = _mm512_maskz_loadu_ps(mask, sine + k);
        __m512 du = _mm512_fmadd_ps(gu, c, _mm512_mul_ps(gv, s)), dv = _mm512_fmsub_ps(gv, c, _mm512_mul_ps(gu, s));
        if (weight) {
            __m512 u = _mm512_mul_ps(load(x + k, mask), scale), v = _mm512_mul_ps(load(x + half + k, mask), scale);
            float *wu = dweight + k, *wv = wu + half;
            store_floats(wu, mask, _mm512_fmadd_ps(du, u, _mm512_maskz_loadu_ps(mask, wu)));
            store_floats(wv, mask, _mm512_fmadd_ps(dv, v, _mm512_maskz_loadu_ps(mask, wv)));
            du = _mm512_mul_ps(du, _mm512_maskz_loadu_ps(mask, weight + k));
            dv = _mm512_mul_ps(dv, _mm512_maskz_loadu_ps(mask, weight + half + k));
            dots = _mm512_fmadd_ps(du, u, _mm512_fmadd_ps(dv, v, dots));
        }
        store_floats(g + k, mask, du);
        store_floats(g + half + k, mask, dv);
    }
    __m512 mean = _mm512_set1_ps(weight ? _mm512_reduce_add_ps(dots) / a->K : 0.0f);
    for (int64_t k = 0; k < a->K; k += LANES) {
        __mmask16 mask = first(a->K - k);
        __m512 unit = _mm512_mul_ps(load(x + k, mask), scale), d = _mm512_maskz_loadu_ps(mask, g + k);
        store(dx + k, mask, weight ? _mm512_mul_ps(scale, _mm512_fnmadd_ps(unit, mean, d)) : d);
    }
}

/* Turned queries or keys, or values as they are, of positions [from, from + count) into rows of KP; zeros around. */
static void rows_of(const Attention *a, const Sizes *z, const bf16 *x, const float *weight, int turn, int64_t from,
                    int64_t count, bf16 *to, float *rstd) {
    for (int64_t i = 0; i < count; i++, to += z->KP) {
        int64_t t = from + i;
        if (t >= a->T) {
            memset(to, 0, z->KP * sizeof(bf16));
            continue;
        }
        if (z->KP > a->K) memset(to + a->K, 0, (z->KP - a->K) * sizeof(bf16));
        for (int64_t k = 0; k < a->K; k += 2 * LANES) ask_for(x + t * z->columns + k, ROWS_AHEAD * z->columns);
        if (turn) {
            float r = turned(a, x + t * z->columns, weight, t, to);
            if (rstd) rstd[i] = r;
        } else {
            memcpy(to, x + t * z->columns, a->K * sizeof(bf16));
        }
    }
}
