/* Causal attention of a training step, forward and backward: match, weigh and gather for a few queries and keys at a time,
 * so that no scores ever leave the cache (FlashAttention, Dao et al., 2022). Activations are bfloat16, sums float32.
 */
#include "heads.h"
#include "products.h"

#define QUERIES 64 /* taken together, a multiple of PANEL */
#define KEYS 256   /* taken together, a multiple of PANEL */

static Sizes sizes_of(const Attention *a) {
    return (Sizes){(a->H + 2 * a->G) * a->K, ROUND_UP(a->T, QUERIES), ROUND_UP(a->K, PANEL)};
}

static inline int64_t start_of(const Attention *a, int64_t b, int64_t t) {
    return a->starts ? a->starts[b * a->T + MIN(t, a->T - 1)] : 0;
}

/* C[QUERIES, keys k0..k1] = rows of A . panels of all keys; what no query of a tile sees is left undefined. */
static void all_scores(const bf16 *A, const uint32_t *B, int64_t KP, int64_t i0, int64_t k0, int64_t k1, float *C) {
    for (int64_t n = k0; n < k1; n += PANEL)
        for (int64_t m = 0; m < QUERIES; m += TILE)
            if (n <= i0 + m + TILE - 1)
                tile(rows_as_left(A + m * KP, KP), B + n * (KP / 2), 0, KP / 2, C + m * KEYS + n - k0, KEYS, 0);
}

/* C[QUERIES, KP] += weights[QUERIES, keys k0..k1] . panels over all keys, of TP rows */
static void add_gathered(const bf16 *weights, const uint32_t *B, const Sizes *z, int64_t i0, int64_t k0, int64_t k1,
                         float *C) {
    for (int64_t n = 0; n < z->KP; n += PANEL)
        for (int64_t m = 0; m < QUERIES; m += TILE) {
            int64_t seen = MIN(k1, i0 + m + TILE) - k0;
            if (seen > 0)
                tile(rows_as_left(weights + m * KEYS, KEYS), B + n * (z->TP / 2) + k0 / 2 * PANEL, 0,
                     ROUND_UP((seen + 1) / 2, TILE_PAIRS), C + m * z->KP + n, z->KP, 1);
        }
}

/* C[keys k0..k1, KP] += transposed weights . panels over the queries; `weights` holds pairs of queries. */
static void add_spread(const uint32_t *weights, const uint32_t *B, const Sizes *z, int64_t i0, int64_t k0, int64_t k1,
                       float *C) {
    uint32_t turned[QUERIES / 2 * PANEL] __attribute__((aligned(64)));
    for (int64_t k = 0; k < k1 - k0; k += PANEL) {
        Left left = left_of(weights + k, KEYS, QUERIES / 2, turned);
        for (int64_t n = 0; n < z->KP; n += PANEL)
            for (int64_t m = k; m < k + PANEL; m += TILE) {
                int64_t before = MAX(0, k0 + m - i0) / 2; /* queries before the first of these keys */
                if (before < QUERIES / 2)
                    tile(from_row(left, m - k), B + n * (QUERIES / 2), before / TILE_PAIRS * TILE_PAIRS, QUERIES / 2,
                         C + (k0 + m) * z->KP + n, z->KP, 1);
            }
    }
}

/* Those of the 16 keys from k on that lie in [from, to); mostly all. */
static inline __mmask16 seen(int64_t k, int64_t from, int64_t to) {
    if (k >= from && k + LANES <= to) return 0xffff;
    if (k >= to || k + LANES <= from) return 0;
    return first(to - k) & (k < from ? (__mmask16)~first(from - k) : 0xffff);
}

/* Turn the scores of a query with keys [from, to) of `count` into weights against the highest score so far, `most` (in
 * powers of two); where that rises, what was summed with the lower one, `total` and the K values in `sums`, fades. */
static inline void weigh(const float *score, int64_t from, int64_t to, int64_t count, float factor, bf16 *weight,
                         float *most, float *total, float *sums, int64_t K) {
    __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(factor);
    for (int64_t k = from / LANES * LANES; k < to; k += LANES) /* in this order a NaN leaves the maximum alone */
        highest = _mm512_mask_max_ps(highest, seen(k, from, to), _mm512_loadu_ps(score + k), highest);
    float top = MAX(*most, _mm512_reduce_max_ps(highest) * factor);
    __m512 shift = _mm512_set1_ps(-top);
    for (int64_t k = 0; k < count; k += LANES) {
        __mmask16 mask = seen(k, from, to);
        __m512 p = _mm512_setzero_ps();
        if (mask) p = _mm512_maskz_mov_ps(mask, exp2_16(_mm512_fmadd_ps(_mm512_loadu_ps(score + k), scale, shift)));
        sum = _mm512_add_ps(sum, p);
        store(weight + k, 0xffff, p);
    }
    if (*most != top && *most > -INFINITY) {
        float fade = exp2f(*most - top);
        *total *= fade;
        for (int64_t k = 0; k < K; k++) sums[k] *= fade;
    }
    *most = top;
    *total += _mm512_reduce_add_ps(sum);
}

/* The weights of a query again, and the gradients of its scores from those of its weights. */
static inline void weigh_back(const float *score, const float *dweight, int64_t from, int64_t to, int64_t count,
                              float factor, float root, float log_sum, float delta, bf16 *weight, bf16 *dscore) {
    __m512 scale = _mm512_set1_ps(factor), dscale = _mm512_set1_ps(root), shift = _mm512_set1_ps(-log_sum);
    for (int64_t k = 0; k < count; k += LANES) {
        __mmask16 mask = seen(k, from, to);
        __m512 p = _mm512_setzero_ps(), ds = p;
        if (mask) {
            p = exp2_16(_mm512_fmadd_ps(_mm512_loadu_ps(score + k), scale, shift));
            ds = _mm512_sub_ps(_mm512_loadu_ps(dweight + k), _mm512_set1_ps(delta));
            ds = _mm512_maskz_mov_ps(mask, _mm512_mul_ps(_mm512_mul_ps(p, dscale), ds));
            p = _mm512_maskz_mov_ps(mask, p);
        }
        store(weight + k, 0xffff, p);
        store(dscore + k, 0xffff, ds);
    }
}

/* Attention of the queries that share key head g of row b. */
static void forward_unit(const Attention *a, const Sizes *z, int64_t b, int64_t g) {
    float factor = LOG2_E / sqrtf((float)a->K); /* from scores to powers of two */
    size_t keys = z->TP * z->KP;
    uint32_t *keys_T = scratch(3 * keys * sizeof(bf16) + QUERIES * (z->KP * 6 + KEYS * 6) + 1024);
    uint32_t *values = keys_T + keys / 2;
    bf16 *rows = (bf16 *)(values + keys / 2), *queries = rows + keys, *weights = queries + QUERIES * z->KP;
    float *scores = (float *)(weights + QUERIES * KEYS), *sums = scores + QUERIES * KEYS;
    const bf16 *here = a->qkv + b * a->T * z->columns;
    rows_of(a, z, here + (a->H + g) * a->K, a->k_norm, 1, 0, z->TP, rows, NULL);
    panels_over_columns(rows, z->TP, z->KP, keys_T);
    rows_of(a, z, here + (a->H + a->G + g) * a->K, NULL, 0, 0, z->TP, rows, NULL);
    panels_over_rows(rows, z->TP, z->KP, values);
    for (int64_t h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) {
            float most[QUERIES], total[QUERIES];
            rows_of(a, z, here + h * a->K, a->q_norm, 1, i0, QUERIES, queries, NULL);
            memset(sums, 0, QUERIES * z->KP * sizeof(float));
            int64_t end = MIN(i0 + QUERIES, z->TP), begin = start_of(a, b, i0) / PANEL * PANEL;
            for (int i = 0; i < QUERIES; i++) most[i] = -INFINITY, total[i] = 0;
            for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
                int64_t k1 = MIN(k0 + KEYS, end);
                all_scores(queries, keys_T, z->KP, i0, k0, k1, scores);
                for (int i = 0; i < QUERIES; i++) {
                    /* The keys that query i sees are from..to of these. */
                    int64_t from = MAX(start_of(a, b, i0 + i) - k0, 0), to = MIN(i0 + i + 1, k1) - k0;
                    bf16 *weight = weights + i * KEYS;
                    if (i0 + i >= a->T || from >= to)
                        memset(weight, 0, (k1 - k0) * sizeof(bf16));
                    else
                        weigh(scores + i * KEYS, from, to, k1 - k0, factor, weight, most + i, total + i,
                              sums + i * z->KP, z->KP);
                }
                add_gathered(weights, values, z, i0, k0, k1, sums);
            }
            for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
                bf16 *to = a->mixed + ((b * a->T + i0 + i) * a->H + h) * a->K;
                __m512 share = _mm512_set1_ps(1.0f / total[i]);
                for (int64_t k = 0; k < a->K; k += LANES)
                    store(to + k, first(a->K - k), _mm512_mul_ps(_mm512_loadu_ps(sums + i * z->KP + k), share));
                a->log_sums[(b * a->H + h) * a->T + i0 + i] = most[i] + log2f(total[i]);
            }
        }
}

/* Units are the key heads of every row: with fewer of them than cores some cores have nothing to do. */
void attention_forward(const Attention *a) {
    Sizes z = sizes_of(a);
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->B * a->G; unit++) forward_unit(a, &z, unit / a->G, unit % a->G);
        end_tiles();
    }
}

/* The gradient of the same, into dqkv; adds to those of q_norm and k_norm, dq_norm and dk_norm. */
static void backward_unit(const Attention *a, const Sizes *z, int64_t b, int64_t g, const bf16 *dmixed, bf16 *dqkv,
                          float *dq_norm, float *dk_norm) {
    float root = 1.0f / sqrtf((float)a->K), factor = LOG2_E * root;
    size_t keys = z->TP * z->KP, queries = QUERIES * z->KP, both = QUERIES * KEYS;
    size_t halves = 4 * keys + 4 * queries + 4 * both, floats = 2 * keys + queries + 2 * both + z->TP + QUERIES;
    uint32_t *keys_T = scratch(halves * sizeof(bf16) + floats * sizeof(float) + 1024);
    uint32_t *keys_2 = keys_T + keys / 2, *values_T = keys_2 + keys / 2;
    bf16 *rows = (bf16 *)(values_T + keys / 2), *q = rows + keys, *d = q + queries;
    uint32_t *q_2 = (uint32_t *)(d + queries), *d_2 = q_2 + queries / 2;
    bf16 *weights = (bf16 *)(d_2 + queries / 2), *dscores = weights + both;
    uint32_t *weights_2 = (uint32_t *)(dscores + both), *dscores_2 = weights_2 + both / 2;
    float *scores = (float *)(dscores_2 + both / 2), *dweights = scores + both, *dq = dweights + both;
    float *dk = dq + queries, *dv = dk + keys, *k_rstd = dv + keys, *q_rstd = k_rstd + z->TP;
    memset(dk, 0, 2 * keys * sizeof(float));
    const bf16 *here = a->qkv + b * a->T * z->columns;
    bf16 *there = dqkv + b * a->T * z->columns;
    rows_of(a, z, here + (a->H + a->G + g) * a->K, NULL, 0, 0, z->TP, rows, NULL);
    panels_over_columns(rows, z->TP, z->KP, values_T);
    rows_of(a, z, here + (a->H + g) * a->K, a->k_norm, 1, 0, z->TP, rows, k_rstd);
    panels_over_columns(rows, z->TP, z->KP, keys_T);
    panels_over_rows(rows, z->TP, z->KP, keys_2);
    for (int64_t h = g * (a->H / a->G); h < (g + 1) * (a->H / a->G); h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) {
            float delta[QUERIES];
            rows_of(a, z, here + h * a->K, a->q_norm, 1, i0, QUERIES, q, q_rstd);
            panels_over_rows(q, QUERIES, z->KP, q_2);
            memset(d, 0, queries * sizeof(bf16));
            for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
                int64_t at = ((b * a->T + i0 + i) * a->H + h) * a->K;
                for (int64_t k = 0; k < a->K; k += PANEL) {
                    ask_for(dmixed + at + k, ROWS_AHEAD * a->H * a->K);
                    ask_for(a->mixed + at + k, ROWS_AHEAD * a->H * a->K);
                }
                __m512 dots = _mm512_setzero_ps();
                for (int64_t k = 0; k < a->K; k += LANES) {
                    __mmask16 mask = first(a->K - k);
                    dots = _mm512_fmadd_ps(load(dmixed + at + k, mask), load(a->mixed + at + k, mask), dots);
                }
                delta[i] = _mm512_reduce_add_ps(dots);
                memcpy(d + i * z->KP, dmixed + at, a->K * sizeof(bf16));
            }
            panels_over_rows(d, QUERIES, z->KP, d_2);
            memset(dq, 0, queries * sizeof(float));
            const float *log_sums = a->log_sums + (b * a->H + h) * a->T + i0;
            int64_t end = MIN(i0 + QUERIES, z->TP), begin = start_of(a, b, i0) / PANEL * PANEL;
            for (int64_t k0 = begin; k0 < end; k0 += KEYS) {
                int64_t k1 = MIN(k0 + KEYS, end);
                all_scores(q, keys_T, z->KP, i0, k0, k1, scores);
                all_scores(d, values_T, z->KP, i0, k0, k1, dweights);
                for (int64_t i = 0; i < QUERIES; i++) {
                    bf16 *weight = weights + i * KEYS, *dscore = dscores + i * KEYS;
                    int64_t from = MAX(start_of(a, b, i0 + i) - k0, 0), to = MIN(i0 + i + 1, k1) - k0;
                    if (i0 + i >= a->T || from >= to) {
                        memset(weight, 0, (k1 - k0) * sizeof(bf16));
                        memset(dscore, 0, (k1 - k0) * sizeof(bf16));
                    } else {
                        weigh_back(scores + i * KEYS, dweights + i * KEYS, from, to, k1 - k0, factor, root, log_sums[i],
                                   delta[i], weight, dscore);
                    }
                    if (i % 2) {
                        pair_rows(weight - KEYS, weight, k1 - k0, weights_2 + i / 2 * KEYS, PANEL);
                        pair_rows(dscore - KEYS, dscore, k1 - k0, dscores_2 + i / 2 * KEYS, PANEL);
                    }
                }
                add_spread(weights_2, d_2, z, i0, k0, k1, dv);
                add_spread(dscores_2, q_2, z, i0, k0, k1, dk);
                add_gathered(dscores, keys_2, z, i0, k0, k1, dq);
            }
            for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
                int64_t at = (i0 + i) * z->columns + h * a->K;
                turned_back(a, here + at, a->q_norm, i0 + i, q_rstd[i], dq + i * z->KP, there + at, dq_norm);
            }
        }
    for (int64_t t = 0; t < a->T; t++) {
        int64_t at = t * z->columns + (a->H + g) * a->K;
        turned_back(a, here + at, a->k_norm, t, k_rstd[t], dk + t * z->KP, there + at, dk_norm);
        for (int64_t k = 0; k < a->K; k += LANES)
            store(there + at + a->G * a->K + k, first(a->K - k), _mm512_loadu_ps(dv + t * z->KP + k));
    }
}

/* dqkv from dmixed; `parts` has 2 K floats a unit (b, g): gradients of q_norm and of k_norm; the first becomes the sum. */
void attention_backward(const Attention *a, const bf16 *dmixed, bf16 *dqkv, float *parts) {
    Sizes z = sizes_of(a);
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->B * a->G; unit++) {
            float *dq_norm = parts + unit * 2 * a->K, *dk_norm = dq_norm + a->K;
            memset(dq_norm, 0, 2 * a->K * sizeof(float));
            backward_unit(a, &z, unit / a->G, unit % a->G, dmixed, dqkv, dq_norm, dk_norm);
        }
        end_tiles();
    }
    add_up(a->B * a->G, 2 * a->K, parts);
}
