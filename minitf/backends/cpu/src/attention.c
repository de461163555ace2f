/* Causal attention of a training step, forward and backward: match, weigh and gather for a block of queries and a
 * block of keys at a time, so that scores never leave the cache (FlashAttention, Dao et al., 2022).
 */
#include "qk.h"

/* In a block; multiples of PANEL. */
#define QUERIES (WORD_SCALARS * 32)
#define KEYS 256

/* The queries that share key head g of row b, and what a thread needs to compute them. */
typedef struct {
    const Attention *a;
    int64_t b, g;
    int64_t columns, TP, KP; /* of qkv; T and K, padded for the products */
    float scale;             /* of scores */
    word *keys_T, *values_T; /* right operands that sum over K */
    word *keys, *values;     /* right operands that sum over T */
    scalar *rows;            /* keys or values, before they are packed */
    float *k_rstd, *dk, *dv; /* TP; TP, KP each */
    /* of a block of queries: */
    scalar *q, *dmixed;            /* QUERIES, KP */
    word *q_panels, *dmixed_panels; /* the same as right operands that sum over queries */
    float *q_rstd, *sums;           /* QUERIES; QUERIES, KP: what is gathered, or the gradient of q */
    float *scores, *dweights;       /* QUERIES, KEYS */
    scalar *weights, *dscores;      /* the same rounded; in float32 they take the place of `scores` and `dweights` */
    word *weights_T, *dscores_T;    /* left operands that sum over queries; in float32 the same again */
} Unit;

static void *take(uintptr_t *at, int64_t bytes) {
    void *taken = (void *)*at;
    *at += ROUND_UP(bytes, 64);
    return taken;
}

/* Give the buffers of a unit their places from `at` on; returns where they end. */
static uintptr_t place_buffers(Unit *u, uintptr_t at) {
    int64_t all = u->TP * u->KP, some = QUERIES * u->KP, block = QUERIES * KEYS, in_place = WORD_SCALARS == 1;
    u->keys_T = take(&at, all * sizeof(scalar)), u->values_T = take(&at, all * sizeof(scalar));
    u->keys = take(&at, all * sizeof(scalar)), u->values = take(&at, all * sizeof(scalar));
    u->rows = take(&at, all * sizeof(scalar)), u->k_rstd = take(&at, u->TP * sizeof(float));
    u->dk = take(&at, all * sizeof(float)), u->dv = take(&at, all * sizeof(float));
    u->q = take(&at, some * sizeof(scalar)), u->dmixed = take(&at, some * sizeof(scalar));
    u->q_panels = take(&at, some * sizeof(scalar)), u->dmixed_panels = take(&at, some * sizeof(scalar));
    u->q_rstd = take(&at, QUERIES * sizeof(float)), u->sums = take(&at, some * sizeof(float));
    u->scores = take(&at, block * sizeof(float)), u->dweights = take(&at, block * sizeof(float));
    u->weights = in_place ? (scalar *)u->scores : take(&at, block * sizeof(scalar));
    u->dscores = in_place ? (scalar *)u->dweights : take(&at, block * sizeof(scalar));
    u->weights_T = in_place ? (word *)u->weights : take(&at, block * sizeof(scalar));
    u->dscores_T = in_place ? (word *)u->dscores : take(&at, block * sizeof(scalar));
    return at;
}

static Unit unit_of(const Attention *a, int64_t number) {
    Unit u = {.a = a, .b = number / a->G, .g = number % a->G, .columns = (a->H + 2 * a->G) * a->K};
    u.TP = ROUND_UP(a->T, QUERIES), u.KP = ROUND_UP(a->K, PANEL), u.scale = 1.0f / sqrtf((float)a->K);
    place_buffers(&u, (uintptr_t)scratch(place_buffers(&u, 0)));
    return u;
}

/* The first scalar of a head (queries, then keys, then values) in row b of qkv or its gradient. */
static inline int64_t head_at(const Unit *u, int64_t head) { return u->b * u->a->T * u->columns + head * u->a->K; }

static inline int64_t start_of(const Unit *u, int64_t t) {
    return u->a->starts ? u->a->starts[u->b * u->a->T + MIN(t, u->a->T - 1)] : 0;
}

/* The keys [from, to) that a query sees among [k0, k1), counted from k0; none if from >= to. */
typedef struct {
    int64_t from, to;
} Seen;

static inline Seen seen_by(const Unit *u, int64_t query, int64_t k0, int64_t k1) {
    if (query >= u->a->T) return (Seen){0, 0};
    return (Seen){MAX(start_of(u, query) - k0, 0), MIN(query + 1, k1) - k0};
}

/* C[QUERIES, keys k0..k1] = rows of A . panels of all keys; what no query of a tile sees is left undefined. */
static void match(const Unit *u, const scalar *A, const word *panels, int64_t i0, int64_t k0, int64_t k1, float *C) {
    const int64_t KP = u->KP, words = KP / WORD_SCALARS;
    for (int64_t n = k0; n < k1; n += PANEL)
        for (int64_t m = 0; m < QUERIES; m += TILE)
            if (n <= i0 + m + TILE - 1)
                tile(rows_as_left(A + m * KP, KP), panels + n * words, 0, words, C + m * KEYS + n - k0, KEYS, 0);
}

/* C[QUERIES, KP] += weights[QUERIES, keys k0..k1] . panels of TP rows */
static void gather(const Unit *u, const scalar *weights, const word *panels, int64_t i0, int64_t k0, int64_t k1,
                   float *C) {
    const int64_t KP = u->KP, TP = u->TP;
    for (int64_t n = 0; n < KP; n += PANEL)
        for (int64_t m = 0; m < QUERIES; m += TILE) {
            int64_t words = (MIN(k1, i0 + m + TILE) - k0 + WORD_SCALARS - 1) / WORD_SCALARS;
            const word *B = panels + (n * TP + k0 * PANEL) / WORD_SCALARS;
            if (words > 0)
                tile(rows_as_left(weights + m * KEYS, KEYS), B, 0, ROUND_UP(words, TILE_WORDS), C + m * KP + n, KP, 1);
        }
}

/* C[keys k0..k1, KP] += transposed weights . panels of QUERIES rows */
static void scatter(const Unit *u, const word *weights_T, const word *panels, int64_t i0, int64_t k0, int64_t k1,
                    float *C) {
    const int64_t KP = u->KP, words = QUERIES / WORD_SCALARS;
    word blocks[QUERIES / WORD_SCALARS * PANEL] __attribute__((aligned(64)));
    for (int64_t k = 0; k < k1 - k0; k += PANEL) {
        Left left = left_of(weights_T + k, KEYS, words, blocks);
        for (int64_t n = 0; n < KP; n += PANEL)
            for (int64_t m = k; m < k + PANEL; m += TILE) {
                int64_t before = MAX(0, k0 + m - i0) / WORD_SCALARS; /* queries before the first of these keys */
                if (before < words)
                    tile(from_row(left, m - k), panels + n * words, before / TILE_WORDS * TILE_WORDS, words,
                         C + (k0 + m) * KP + n, KP, 1);
            }
    }
}

/* Scores of a query with `count` keys become weights relative to the highest score so far, `most` (as a power of
 * two). When that rises, the sums of earlier keys, `total` and K of `sums`, are scaled down. */
static inline void weigh(const float *scores, Seen seen, int64_t count, float factor, scalar *weights, float *most,
                         float *total, float *sums, int64_t K) {
    vec highest = all(-INFINITY), sum = all(0);
    for (int64_t k = seen.from / LANES * LANES; k < seen.to; k += LANES) /* in this order NaN is no maximum */
        highest = maximum(within(load_vec(scores + k), seen.from - k, seen.to - k, -INFINITY), highest);
    float top = MAX(*most, max_of(highest) * factor);
    for (int64_t k = 0; k < count; k += LANES) {
        vec weight = all(0);
        if (k + LANES > seen.from && k < seen.to)
            weight = within(exp2_of(load_vec(scores + k) * factor - top), seen.from - k, seen.to - k, 0);
        sum += weight;
        store(weights + k, first(LANES), weight);
    }
    if (*most != top && *most > -INFINITY) {
        float fade = exp2f(*most - top);
        *total *= fade;
        for (int64_t k = 0; k < K; k++) sums[k] *= fade;
    }
    *most = top;
    *total += sum_of(sum);
}

static void forward_block(const Unit *u, int64_t h, int64_t i0) {
    const Attention *a = u->a;
    float most[QUERIES], total[QUERIES];
    for (int i = 0; i < QUERIES; i++) most[i] = -INFINITY, total[i] = 0;
    memset(u->sums, 0, QUERIES * u->KP * sizeof(float));
    take_rows(a, a->qkv + head_at(u, h), u->columns, a->q_norm, i0, QUERIES, u->q, u->KP, u->q_rstd);
    int64_t end = i0 + QUERIES;
    for (int64_t k0 = start_of(u, i0) / PANEL * PANEL, k1; k0 < end; k0 = k1) {
        k1 = MIN(k0 + KEYS, end);
        match(u, u->q, u->keys_T, i0, k0, k1, u->scores);
        for (int64_t i = 0; i < QUERIES; i++) {
            Seen seen = seen_by(u, i0 + i, k0, k1);
            scalar *weights = u->weights + i * KEYS;
            if (seen.from >= seen.to)
                memset(weights, 0, (k1 - k0) * sizeof *weights);
            else
                weigh(u->scores + i * KEYS, seen, k1 - k0, LOG2_E * u->scale, weights, most + i, total + i,
                      u->sums + i * u->KP, u->KP);
        }
        gather(u, u->weights, u->values, i0, k0, k1, u->sums);
    }
    for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
        scalar *mixed = a->mixed + ((u->b * a->T + i0 + i) * a->H + h) * a->K;
        for (int64_t k = 0; k < a->K; k += LANES)
            store(mixed + k, first(a->K - k), load_vec(u->sums + i * u->KP + k) * (1.0f / total[i]));
        a->log_sums[(u->b * a->H + h) * a->T + i0 + i] = most[i] + log2f(total[i]);
    }
}

static void forward_unit(const Attention *a, int64_t number) {
    Unit u = unit_of(a, number);
    int64_t group = a->H / a->G;
    const scalar *keys = a->qkv + head_at(&u, a->H + u.g), *values = keys + a->G * a->K;
    take_rows(a, keys, u.columns, a->k_norm, 0, u.TP, u.rows, u.KP, u.k_rstd);
    panels_over_columns(u.rows, u.TP, u.KP, u.keys_T);
    take_rows(a, values, u.columns, NULL, 0, u.TP, u.rows, u.KP, NULL);
    panels_over_rows(u.rows, u.TP, u.KP, u.values);
    for (int64_t h = u.g * group; h < (u.g + 1) * group; h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) forward_block(&u, h, i0);
}

/* A unit is a key head of a row: with fewer units than cores some cores are idle. */
void attention_forward(const Attention *a) {
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->B * a->G; unit++) forward_unit(a, unit);
        end_tiles();
    }
}

/* The weights of a query again, and from the gradients of its weights those of its scores. `delta` is the sum of
 * weights times their gradients. */
static inline void weigh_backward(const float *scores, const float *dweights, Seen seen, int64_t count, float scale,
                                  float log_sum, float delta, scalar *weights, scalar *dscores) {
    for (int64_t k = 0; k < count; k += LANES) {
        vec weight = all(0), dscore = all(0);
        if (k + LANES > seen.from && k < seen.to) {
            weight = exp2_of(load_vec(scores + k) * (LOG2_E * scale) - log_sum);
            dscore = within(weight * scale * (load_vec(dweights + k) - delta), seen.from - k, seen.to - k, 0);
            weight = within(weight, seen.from - k, seen.to - k, 0);
        }
        store(weights + k, first(LANES), weight);
        store(dscores + k, first(LANES), dscore);
    }
}

/* The gradient of what a block of queries gathered, and for each query its product with what was gathered. */
static void take_gradients(const Unit *u, const scalar *dmixed, int64_t h, int64_t i0, float *delta) {
    const Attention *a = u->a;
    int64_t row = a->H * a->K, at = u->b * a->T * row + h * a->K;
    take_rows(a, dmixed + at, row, NULL, i0, QUERIES, u->dmixed, u->KP, NULL);
    panels_over_rows(u->dmixed, QUERIES, u->KP, u->dmixed_panels);
    for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
        const scalar *mixed = a->mixed + at + (i0 + i) * row;
        for (int64_t k = 0; k < a->K; k += LINE_SCALARS) prefetch(mixed + k, ROWS_AHEAD * row);
        vec dots = all(0);
        for (int64_t k = 0; k < a->K; k += LANES) {
            lanes some = first(a->K - k);
            dots += load(u->dmixed + i * u->KP + k, some) * load(mixed + k, some);
        }
        delta[i] = sum_of(dots);
    }
}

/* Adds to dk and dv of the unit, and to dq_norm. */
static void backward_block(const Unit *u, int64_t h, int64_t i0, const scalar *dmixed, scalar *dqkv, float *dq_norm) {
    const Attention *a = u->a;
    float delta[QUERIES];
    const float *log_sums = a->log_sums + (u->b * a->H + h) * a->T + i0;
    take_rows(a, a->qkv + head_at(u, h), u->columns, a->q_norm, i0, QUERIES, u->q, u->KP, u->q_rstd);
    panels_over_rows(u->q, QUERIES, u->KP, u->q_panels);
    take_gradients(u, dmixed, h, i0, delta);
    memset(u->sums, 0, QUERIES * u->KP * sizeof(float));
    int64_t end = i0 + QUERIES;
    for (int64_t k0 = start_of(u, i0) / PANEL * PANEL, k1; k0 < end; k0 = k1) {
        k1 = MIN(k0 + KEYS, end);
        int64_t bytes = (k1 - k0) * sizeof(scalar);
        match(u, u->q, u->keys_T, i0, k0, k1, u->scores);
        match(u, u->dmixed, u->values_T, i0, k0, k1, u->dweights);
        for (int64_t i = 0; i < QUERIES; i++) {
            Seen seen = seen_by(u, i0 + i, k0, k1);
            scalar *weights = u->weights + i * KEYS, *dscores = u->dscores + i * KEYS;
            if (seen.from >= seen.to) {
                memset(weights, 0, bytes);
                memset(dscores, 0, bytes);
            } else {
                weigh_backward(u->scores + i * KEYS, u->dweights + i * KEYS, seen, k1 - k0, u->scale, log_sums[i],
                               delta[i], weights, dscores);
            }
            if (WORD_SCALARS == 2 && i % 2) {
                pack_words(weights - KEYS, weights, k1 - k0, u->weights_T + i / 2 * KEYS, PANEL);
                pack_words(dscores - KEYS, dscores, k1 - k0, u->dscores_T + i / 2 * KEYS, PANEL);
            }
        }
        scatter(u, u->weights_T, u->dmixed_panels, i0, k0, k1, u->dv);
        scatter(u, u->dscores_T, u->q_panels, i0, k0, k1, u->dk);
        gather(u, u->dscores, u->keys, i0, k0, k1, u->sums);
    }
    for (int64_t i = 0; i < MIN(QUERIES, a->T - i0); i++) {
        int64_t at = head_at(u, h) + (i0 + i) * u->columns;
        norm_and_rotate_backward(a, a->qkv + at, a->q_norm, i0 + i, u->q_rstd[i], u->sums + i * u->KP, dqkv + at,
                                 dq_norm);
    }
}

/* Gradients of one unit into dqkv, and of the weights of q_norm and k_norm into `dnorms`. */
static void backward_unit(const Attention *a, int64_t number, const scalar *dmixed, scalar *dqkv, float *dnorms) {
    Unit u = unit_of(a, number);
    int64_t group = a->H / a->G, key = head_at(&u, a->H + u.g), value = key + a->G * a->K;
    memset(dnorms, 0, 2 * a->K * sizeof *dnorms);
    memset(u.dk, 0, u.TP * u.KP * sizeof *u.dk);
    memset(u.dv, 0, u.TP * u.KP * sizeof *u.dv);
    take_rows(a, a->qkv + value, u.columns, NULL, 0, u.TP, u.rows, u.KP, NULL);
    panels_over_columns(u.rows, u.TP, u.KP, u.values_T);
    take_rows(a, a->qkv + key, u.columns, a->k_norm, 0, u.TP, u.rows, u.KP, u.k_rstd);
    panels_over_columns(u.rows, u.TP, u.KP, u.keys_T);
    panels_over_rows(u.rows, u.TP, u.KP, u.keys);
    for (int64_t h = u.g * group; h < (u.g + 1) * group; h++)
        for (int64_t i0 = 0; i0 < a->T; i0 += QUERIES) backward_block(&u, h, i0, dmixed, dqkv, dnorms);
    for (int64_t t = 0; t < a->T; t++) {
        int64_t at = t * u.columns;
        norm_and_rotate_backward(a, a->qkv + key + at, a->k_norm, t, u.k_rstd[t], u.dk + t * u.KP, dqkv + key + at,
                                 dnorms + a->K);
        for (int64_t k = 0; k < a->K; k += LANES)
            store(dqkv + value + at + k, first(a->K - k), load_vec(u.dv + t * u.KP + k));
    }
}

/* dqkv from dmixed; `parts` has 2 K floats a unit, the gradients of q_norm and of k_norm; the first becomes their
 * sum. */
void attention_backward(const Attention *a, const scalar *dmixed, scalar *dqkv, float *parts) {
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < a->B * a->G; unit++)
            backward_unit(a, unit, dmixed, dqkv, parts + unit * 2 * a->K);
        end_tiles();
    }
    add_rows(a->B * a->G, 2 * a->K, parts);
}
