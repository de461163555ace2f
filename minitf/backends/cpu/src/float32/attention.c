/* Causal attention of a training step in float32, forward and backward: match, weigh and gather for a few queries at a
 * time, whose scores stay in the cache (FlashAttention, Dao et al., 2022).
 *
 * Plain C but for the products, whose vectors are the compiler's own (`vector_size`), as wide as the processor's.
 */
#include "numbers.h"

/* Every row of qkv, one of B * T, holds H queries, G keys and G values of K numbers, as their product made them. */
typedef struct {
    int64_t B, T, H, G, K;
    const float *qkv;
    const float *q_norm, *k_norm; /* K weights each, or null: not normalised */
    float eps;
    const float *cosines, *sines; /* rows of K a position, of which the second half repeats the first */
    const int32_t *starts;        /* the first key each query sees, B * T, ascending in a row; null: 0 */
    float *mixed;                 /* B, T, H, K */
    float *log_sums;              /* B, H, T: log2 of the sum of the powers of the scaled scores */
} Attention;

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Else the compiler reads them again for each row. */
#if defined(__x86_64__)
#define IN_REGISTERS(a, b) __asm__("" : "+x"(a), "+x"(b))
#else
#define IN_REGISTERS(a, b)
#endif

#define TILE 4             /* rows, */
#define PANEL (2 * LANES)  /* columns whose sums are in registers together */
#define QUERIES 32         /* taken together, a multiple of TILE and PANEL */
#define LINE 16            /* numbers the processor fetches together */

/* Asks for the K numbers of the row so many rows behind x, to be there when they are needed: a head's rows lie far
 * apart, and the processor does not see them coming. */
#define ROWS_AHEAD 8
static inline void ask_for(const float *x, int64_t row, int64_t K) {
    for (int64_t k = 0; k < K; k += LINE) __builtin_prefetch(x + ROWS_AHEAD * row + k);
}

/* C[TILE, PANEL] = or += A . B over [from, to): number p of row m of A is at A[m * row + p * step], row p of B at
 * B + p * B_row. */
static inline void tile(const float *A, int64_t row, int64_t step, const float *B, int64_t B_row, int64_t from,
                        int64_t to, float *C, int64_t C_row, int add) {
    vector sums[TILE][2];
#pragma GCC unroll 4
    for (int m = 0; m < TILE; m++) {
        const vector *old = (const vector *)(C + m * C_row);
        sums[m][0] = add ? old[0] : (vector){0};
        sums[m][1] = add ? old[1] : (vector){0};
    }
    for (int64_t p = from; p < to; p++) {
        vector left = *(const vector *)(B + p * B_row), right = *(const vector *)(B + p * B_row + LANES);
        IN_REGISTERS(left, right);
#pragma GCC unroll 4
        for (int m = 0; m < TILE; m++) {
            float a = A[m * row + p * step];
            sums[m][0] += a * left;
            sums[m][1] += a * right;
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < TILE; m++) {
        vector *out = (vector *)(C + m * C_row);
        out[0] = sums[m][0];
        out[1] = sums[m][1];
    }
}

typedef struct {
    int64_t columns, TP, KP; /* of qkv; T and K rounded up for the products */
} Sizes;

static Sizes sizes_of(const Attention *a) {
    return (Sizes){(a->H + 2 * a->G) * a->K, ROUND_UP(a->T, QUERIES), ROUND_UP(a->K, PANEL)};
}

/* y = rotate(x * rstd * weight) for one head at one position; returns rstd. K is even; halves turn against each
 * other. */
static inline float turned(const Attention *a, const float *restrict x, const float *restrict weight, int64_t t,
                           float *restrict y) {
    int64_t half = a->K / 2;
    const float *cosines = a->cosines + t * a->K, *sines = a->sines + t * a->K;
    if (!weight) {
        for (int64_t k = 0; k < half; k++) {
            y[k] = x[k] * cosines[k] - x[k + half] * sines[k];
            y[k + half] = x[k + half] * cosines[k] + x[k] * sines[k];
        }
        return 1.0f;
    }
    float r = reciprocal_rms(a->K, x, a->eps);
    for (int64_t k = 0; k < half; k++) {
        float first = x[k] * r * weight[k], second = x[k + half] * r * weight[k + half];
        y[k] = first * cosines[k] - second * sines[k];
        y[k + half] = second * cosines[k] + first * sines[k];
    }
    return r;
}

/* The way back of `turned`: the gradient dx of x from that of its result, dy; adds to dweight. */
static inline void turned_back(const Attention *a, const float *restrict x, const float *restrict weight, int64_t t,
                               float r, const float *restrict dy, float *restrict dx, float *restrict dweight) {
    int64_t half = a->K / 2;
    const float *cosines = a->cosines + t * a->K, *sines = a->sines + t * a->K;
    for (int64_t k = 0; k < half; k++) {
        dx[k] = dy[k] * cosines[k] + dy[k + half] * sines[k];
        dx[k + half] = dy[k + half] * cosines[k] - dy[k] * sines[k];
    }
    if (weight) norm_gradient(a->K, x, r, weight, dx, dx, dweight);
}

/* Turned queries or keys of positions [from, from + count) into rows of KP; zeros around. */
static void turned_rows(const Attention *a, const Sizes *z, const float *x, const float *weight, int64_t from,
                        int64_t count, float *to, float *rstd) {
    memset(to, 0, count * z->KP * sizeof(float));
    for (int64_t i = 0; i < MIN(count, a->T - from); i++) {
        const float *here = x + (from + i) * z->columns;
        ask_for(here, z->columns, a->K);
        rstd[i] = turned(a, here, weight, from + i, to + i * z->KP);
    }
}

/* `count` rows of K numbers, `row` apart, into `padded` rows of KP; zeros around. */
static void plain_rows(const Attention *a, const Sizes *z, const float *x, int64_t row, int64_t count, int64_t padded,
                       float *to) {
    memset(to, 0, padded * z->KP * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        ask_for(x + i * row, row, a->K);
        memcpy(to + i * z->KP, x + i * row, a->K * sizeof(float));
    }
}

/* The right side of products over the numbers of each row: number k of row t is at
 * to[(t / PANEL * KP + k) * PANEL + t % PANEL]. */
static void panels_of(const Sizes *z, const float *rows, float *to) {
    for (int64_t t = 0; t < z->TP; t += PANEL, to += z->KP * PANEL)
        for (int64_t k = 0; k < z->KP; k++)
            for (int64_t i = 0; i < PANEL; i++) to[k * PANEL + i] = rows[(t + i) * z->KP + k];
}

static inline int64_t start_of(const Attention *a, int64_t b, int64_t t) {
    return a->starts ? a->starts[b * a->T + MIN(t, a->T - 1)] : 0;
}

/* C[QUERIES, keys begin..] = rows of A . panels of all keys; what no query of a tile sees is left undefined. */
static void all_scores(const Sizes *z, const float *A, const float *panels, int64_t i0, int64_t begin, float *C) {
    for (int64_t n = begin; n < i0 + QUERIES; n += PANEL)
        for (int64_t m = MAX(0, n - i0) / TILE * TILE; m < QUERIES; m += TILE)
            tile(A + m * z->KP, z->KP, 1, panels + n * z->KP, PANEL, 0, z->KP, C + m * z->TP + n, z->TP, 0);
}

/* C[QUERIES, KP] = weights[QUERIES, keys begin..] . rows of all keys */
static void gather(const Sizes *z, const float *weights, const float *rows, int64_t i0, int64_t begin, float *C) {
    for (int64_t n = 0; n < z->KP; n += PANEL)
        for (int64_t m = 0; m < QUERIES; m += TILE)
            tile(weights + m * z->TP, z->TP, 1, rows + n, z->KP, begin, i0 + m + TILE, C + m * z->KP + n, z->KP, 0);
}

/* C[keys begin.., KP] += transposed weights . rows of the queries */
static void add_spread(const Sizes *z, const float *weights, const float *rows, int64_t i0, int64_t begin, float *C) {
    for (int64_t n = 0; n < z->KP; n += PANEL)
        for (int64_t m = begin; m < i0 + QUERIES; m += TILE)
            tile(weights + m, 1, z->TP, rows + n, z->KP, MAX(0, m - i0), QUERIES, C + m * z->KP + n, z->KP, 1);
}

/* Turn the scores of a query with keys [from, to) into weights that sum to 1, and into zeros those beside them, from
 * `begin` to `end`, which are multiples of PANEL. Returns log2 of the sum of the powers. */
static inline float weigh(float *scores, int32_t begin, int32_t from, int32_t to, int32_t end, float factor) {
    float top = maximum(scores + from, to - from) * factor, total = 0;
    for (int32_t j = begin; j < end; j++) {
        float power = power_of_2(scores[j] * factor - top);
        total += scores[j] = j >= from && j < to ? power : 0.0f;
    }
    float share = 1.0f / total;
    for (int32_t j = begin; j < end; j++) scores[j] *= share;
    return top + log2f(total);
}

/* The weights of a query again, and in place of the gradients of its weights those of its scores. */
static inline void weigh_back(float *scores, float *gradients, int32_t begin, int32_t from, int32_t to, int32_t end,
                              float factor, float root, float log_sum, float delta) {
    for (int32_t j = begin; j < end; j++) {
        float weight = power_of_2(scores[j] * factor - log_sum), gradient = weight * root * (gradients[j] - delta);
        scores[j] = j >= from && j < to ? weight : 0.0f;
        gradients[j] = j >= from && j < to ? gradient : 0.0f;
    }
}

/* Attention of the queries that share key head g of row b. */
static void forward_unit(const Attention *a, const Sizes *z, int64_t b, int64_t g) {
    float factor = LOG2_E / sqrtf((float)a->K); /* from scores to powers of two */
    int64_t all = z->TP * z->KP, some = QUERIES * z->KP;
    float *keys = scratch((3 * all + 2 * some + QUERIES * z->TP + z->TP) * sizeof(float));
    float *values = keys + all, *rows = values + all, *queries = rows + all, *sums = queries + some;
    float *scores = sums + some, *rstd = scores + QUERIES * z->TP;
    const float *here = a->qkv + b * a->T * z->columns;
    turned_rows(a, z, here + (a->H + g) * a->K, a->k_norm, 0, z->TP, rows, rstd);
    panels_of(z, rows, keys);
    plain_rows(a, z, here + (a->H + a->G + g) * a->K, z->columns, a->T, z->TP, values);
    for (int64_t h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) {
            int64_t begin = start_of(a, b, i0) / PANEL * PANEL, count = MIN(QUERIES, a->T - i0);
            turned_rows(a, z, here + h * a->K, a->q_norm, i0, QUERIES, queries, rstd);
            all_scores(z, queries, keys, i0, begin, scores);
            for (int64_t i = 0; i < QUERIES; i++) {
                float *row = scores + i * z->TP;
                if (i < count)
                    a->log_sums[(b * a->H + h) * a->T + i0 + i] =
                        weigh(row, begin, start_of(a, b, i0 + i), i0 + i + 1, i0 + QUERIES, factor);
                else
                    memset(row + begin, 0, (i0 + QUERIES - begin) * sizeof(float));
            }
            gather(z, scores, values, i0, begin, sums);
            for (int64_t i = 0; i < count; i++)
                memcpy(a->mixed + ((b * a->T + i0 + i) * a->H + h) * a->K, sums + i * z->KP, a->K * sizeof(float));
        }
}

/* Units are the key heads of every row: with fewer of them than cores some cores have nothing to do. */
void attention_forward(const Attention *a) {
    Sizes z = sizes_of(a);
#pragma omp parallel for schedule(dynamic)
    for (int64_t unit = 0; unit < a->B * a->G; unit++) forward_unit(a, &z, unit / a->G, unit % a->G);
}

/* The gradient of the same, into dqkv; adds to those of q_norm and k_norm, dq_norm and dk_norm. */
static void backward_unit(const Attention *a, const Sizes *z, int64_t b, int64_t g, const float *dmixed, float *dqkv,
                          float *dq_norm, float *dk_norm) {
    float root = 1.0f / sqrtf((float)a->K), factor = LOG2_E * root;
    int64_t all = z->TP * z->KP, some = QUERIES * z->KP, tiles = QUERIES * z->TP;
    float *keys = scratch((5 * all + 3 * some + 2 * tiles + z->TP + QUERIES) * sizeof(float));
    float *keys_T = keys + all, *values_T = keys_T + all, *dk = values_T + all, *dv = dk + all;
    float *q = dv + all, *dq = q + some, *d = dq + some, *scores = d + some, *gradients = scores + tiles;
    float *k_rstd = gradients + tiles, *q_rstd = k_rstd + z->TP;
    const float *here = a->qkv + b * a->T * z->columns;
    float *there = dqkv + b * a->T * z->columns;
    plain_rows(a, z, here + (a->H + a->G + g) * a->K, z->columns, a->T, z->TP, keys);
    panels_of(z, keys, values_T);
    turned_rows(a, z, here + (a->H + g) * a->K, a->k_norm, 0, z->TP, keys, k_rstd);
    panels_of(z, keys, keys_T);
    memset(dk, 0, 2 * all * sizeof(float));
    for (int64_t h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) {
            int64_t begin = start_of(a, b, i0) / PANEL * PANEL, count = MIN(QUERIES, a->T - i0);
            int64_t first = ((b * a->T + i0) * a->H + h) * a->K, row = a->H * a->K;
            turned_rows(a, z, here + h * a->K, a->q_norm, i0, QUERIES, q, q_rstd);
            plain_rows(a, z, dmixed + first, row, count, QUERIES, d);
            all_scores(z, q, keys_T, i0, begin, scores);
            all_scores(z, d, values_T, i0, begin, gradients);
            for (int64_t i = 0; i < QUERIES; i++) {
                float *score = scores + i * z->TP, *gradient = gradients + i * z->TP, delta = 0;
                if (i >= count) {
                    memset(score + begin, 0, (i0 + QUERIES - begin) * sizeof(float));
                    memset(gradient + begin, 0, (i0 + QUERIES - begin) * sizeof(float));
                    continue;
                }
                const float *mixed = a->mixed + first + i * row, *dmix = d + i * z->KP;
                for (int64_t k = 0; k < a->K; k++) delta += mixed[k] * dmix[k];
                weigh_back(score, gradient, begin, start_of(a, b, i0 + i), i0 + i + 1, i0 + QUERIES, factor, root,
                           a->log_sums[(b * a->H + h) * a->T + i0 + i], delta);
            }
            add_spread(z, scores, d, i0, begin, dv);
            add_spread(z, gradients, q, i0, begin, dk);
            gather(z, gradients, keys, i0, begin, dq);
            for (int64_t i = 0; i < count; i++) {
                int64_t at = (i0 + i) * z->columns + h * a->K;
                turned_back(a, here + at, a->q_norm, i0 + i, q_rstd[i], dq + i * z->KP, there + at, dq_norm);
            }
        }
    for (int64_t t = 0; t < a->T; t++) {
        int64_t at = t * z->columns + (a->H + g) * a->K;
        turned_back(a, here + at, a->k_norm, t, k_rstd[t], dk + t * z->KP, there + at, dk_norm);
        memcpy(there + at + a->G * a->K, dv + t * z->KP, a->K * sizeof(float));
    }
}

/* dqkv from dmixed; `parts` has 2 K floats a unit (b, g): gradients of q_norm and of k_norm; the first becomes the sum. */
void attention_backward(const Attention *a, const float *dmixed, float *dqkv, float *parts) {
    Sizes z = sizes_of(a);
#pragma omp parallel for schedule(dynamic)
    for (int64_t unit = 0; unit < a->B * a->G; unit++) {
        float *dq_norm = parts + unit * 2 * a->K, *dk_norm = dq_norm + a->K;
        memset(dq_norm, 0, 2 * a->K * sizeof(float));
        backward_unit(a, &z, unit / a->G, unit % a->G, dmixed, dqkv, dq_norm, dk_norm);
    }
    add_up(a->B * a->G, 2 * a->K, parts);
}
