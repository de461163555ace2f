/* One step of decoding on a processor: the next-token scores of some rows of a batch, from the key/value cache.

   It is the model of model.py for a single position, read from its own float32 parameters. A small model in PyTorch
   spends four fifths of such a step between the operations; here it is as fast as the weights can be read. Threads share
   out the outputs of each product, so that each weight is read by one of them, and wait for each other five times a layer.

   Axes as everywhere: D hidden, H heads, G key/value heads, K head width, F feed-forward, V vocabulary. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define WIDTH 16 /* floats the compiler handles as one value; it splits them for narrower processors */
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));

typedef struct {
    const float *input_norm, *q, *k, *v, *q_norm, *k_norm, *o, *post_norm, *gate, *up, *down;
} Layer;

typedef struct {
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size;
    int64_t batch_size, capacity, num_positions;
    float norm_eps;
    const float *embedding, *final_norm, *vocabulary, *rotary; /* rotary: (2, num_positions, K) */
    float *keys, *values;                                      /* (layers, B, G, capacity, K) */
    const Layer *layers;
} Model;

/* In halves: lane by lane would take longer than the products of a small layer. */
static float sum(Vector v) {
    typedef float Half __attribute__((vector_size(2 * WIDTH)));
    typedef float Quarter __attribute__((vector_size(WIDTH)));
    union { Vector whole; Half halves[2]; } a = {v};
    union { Half whole; Quarter halves[2]; } b = {a.halves[0] + a.halves[1]};
    Quarter c = b.halves[0] + b.halves[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* y[r][n] = sum_d x[r][d] weight[n][d] for R rows and N outputs at once: each loaded value is used R or N times. */
#define TILE(R, N)                                                                                        \
    static void tile_##R##_##N(float *y, int64_t y_stride, const float *x, const float *w, int64_t D) {   \
        Vector sums[R][N];                                                                                \
        memset(sums, 0, sizeof sums);                                                                     \
        int64_t d = 0;                                                                                    \
        for (; d + WIDTH <= D; d += WIDTH)                                                                \
            for (int n = 0; n < N; n++) {                                                                 \
                __builtin_prefetch(w + (N + n) * D + d); /* the next tile's weights */                    \
                for (int r = 0; r < R; r++)                                                               \
                    sums[r][n] += *(const Vector *)(x + r * D + d) * *(const Vector *)(w + n * D + d);    \
            }                                                                                             \
        for (int r = 0; r < R; r++)                                                                       \
            for (int n = 0; n < N; n++) {                                                                 \
                float total = sum(sums[r][n]);                                                            \
                for (int64_t rest = d; rest < D; rest++) total += x[r * D + rest] * w[n * D + rest];      \
                y[r * y_stride + n] = total;                                                              \
            }                                                                                             \
    }
TILE(1, 1)
TILE(1, 8)
TILE(4, 1)
TILE(4, 4)

/* What is one thread's of N things, in whole eights: [from, to). */
typedef struct { int64_t from, to; } Share;
static Share share_of(int64_t N, int64_t thread, int64_t threads) {
    int64_t eights = (N + 7) / 8, to = (thread + 1) * eights / threads * 8;
    return (Share){thread * eights / threads * 8, to < N ? to : N};
}

/* y = x weight^T for a share of the outputs: x (rows, D), weight (N, D), y (rows, N). Each weight is read once. */
static void linear(float *y, const float *x, const float *weight, int64_t rows, int64_t N, int64_t D, Share own) {
    int64_t many = rows >= 4 ? 4 : 8;
    for (int64_t n = own.from; n < own.to; n += many) {
        if (n + many > own.to) many = 1;
        const float *w = weight + n * D;
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) (many == 4 ? tile_4_4 : tile_4_1)(y + r * N + n, N, x + r * D, w, D);
        for (; r < rows; r++) {
            if (many == 8) tile_1_8(y + r * N + n, N, x + r * D, w, D);
            else for (int64_t i = 0; i < many; i++) tile_1_1(y + r * N + n + i, N, x + r * D, w + i * D, D);
        }
    }
}

/* x += y weight^T, through `scratch` of the size of x. */
static void add_linear(float *x, const float *y, const float *weight, int64_t rows, int64_t N, int64_t D, Share own,
                       float *scratch) {
    linear(scratch, y, weight, rows, N, D, own);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * N + own.from; i < r * N + own.to; i++) x[i] += scratch[i];
}

/* y = x / rms(x) * weight, size values */
static void rms_norm(float *y, const float *x, const float *weight, int64_t size, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
}

/* Normalise one head's query or key, if the model does, and turn it by its position. */
static void place(float *x, const float *weight, const float *cosines, const float *sines, int64_t K,
                  float eps) {
    if (weight) rms_norm(x, x, weight, K, eps);
    for (int64_t i = 0; i < K / 2; i++) {
        float first = x[i], second = x[K / 2 + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[K / 2 + i] = second * cosines[i] + first * sines[i];
    }
}

/* e^x = 2^n e^r with r = x - n ln 2 and |r| <= ln(2)/2: Taylor's polynomial is then exact to a rounding or two. */
static float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = (float)(int32_t)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts, the first exact in few bits */
    float polynomial = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return polynomial * power.value;
}

/* N vectors of the values' sum by their weights, kept in registers over all keys. */
#define GATHER(N)                                                                                         \
    static void gather_##N(float *mixed, const float *weights, const float *values, int64_t length,       \
                           int64_t K, float scale) {                                                      \
        Vector sums[N];                                                                                   \
        memset(sums, 0, sizeof sums);                                                                     \
        for (int64_t s = 0; s < length; s++)                                                              \
            for (int n = 0; n < N; n++) sums[n] += weights[s] * *(const Vector *)(values + s * K + n * WIDTH); \
        for (int n = 0; n < N; n++) *(Vector *)(mixed + n * WIDTH) = sums[n] * scale;                     \
    }
GATHER(1)
GATHER(4)

/* One query head over `length` keys: match, weigh, gather. */
static void attend(float *mixed, const float *q, const float *keys, const float *values, float *weights,
                   int64_t length, int64_t K) {
    float scale = 1 / sqrtf(K), largest = -INFINITY, total = 0;
    linear(weights, q, keys, 1, length, K, (Share){0, length});
    for (int64_t s = 0; s < length; s++) {
        weights[s] *= scale;
        largest = weights[s] > largest ? weights[s] : largest;
    }
    for (int64_t s = 0; s < length; s++) weights[s] = exponential(weights[s] - largest);
    for (int64_t s = 0; s < length; s++) total += weights[s];
    int64_t i = 0;
    for (; i + 4 * WIDTH <= K; i += 4 * WIDTH) gather_4(mixed + i, weights, values + i, length, K, 1 / total);
    for (; i + WIDTH <= K; i += WIDTH) gather_1(mixed + i, weights, values + i, length, K, 1 / total);
    for (; i < K; i++) {
        float rest = 0;
        for (int64_t s = 0; s < length; s++) rest += weights[s] * values[s * K + i];
        mixed[i] = rest / total;
    }
}

/* Floats of working memory that `decode` needs for so many threads. */
int64_t decode_scratch(const Model *m, int64_t threads) {
    return m->batch_size * (m->hidden_size + 2 * m->num_heads * m->head_dim + 2 * m->num_kv_heads * m->head_dim
                            + 2 * m->intermediate_size)
           + threads * (m->batch_size * m->hidden_size + m->capacity);
}

#ifdef _OPENMP
#define WAIT_FOR_ALL() _Pragma("omp barrier")
#else
#define WAIT_FOR_ALL()
#endif

/* Read ids (one a row) at `position` into the cache and write logits (rows, V), as thread `thread` of `threads`.
   `starts` is where the text of each row begins in the cache, or null: all at 0. */
static void decode_share(const Model *m, const int64_t *ids, const int64_t *starts, int64_t position, float *logits,
                         float *scratch, int64_t thread, int64_t threads) {
    int64_t D = m->hidden_size, H = m->num_heads, G = m->num_kv_heads, K = m->head_dim, F = m->intermediate_size;
    int64_t rows = m->batch_size;
    float *x = scratch, *q = x + rows * D, *mixed = q + rows * H * K, *k = mixed + rows * H * K, *v = k + rows * G * K;
    float *gate = v + rows * G * K, *up = gate + rows * F;
    float *normed = up + rows * F + thread * (rows * D + m->capacity), *weights = normed + rows * D; /* its own */
    const float *cosines = m->rotary + position * K, *sines = cosines + m->num_positions * K;
    Share columns = share_of(D, thread, threads), hidden = share_of(F, thread, threads);
    Share groups = {rows * G * thread / threads, rows * G * (thread + 1) / threads};

    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = columns.from; i < columns.to; i++) x[r * D + i] = m->embedding[ids[r] * D + i];
    WAIT_FOR_ALL();
    for (int64_t l = 0; l < m->num_layers; l++) {
        const Layer *layer = &m->layers[l];
        for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, layer->input_norm, D, m->norm_eps);
        linear(q, normed, layer->q, rows, H * K, D, share_of(H * K, thread, threads));
        linear(k, normed, layer->k, rows, G * K, D, share_of(G * K, thread, threads));
        linear(v, normed, layer->v, rows, G * K, D, share_of(G * K, thread, threads));
        WAIT_FOR_ALL();
        for (int64_t i = groups.from; i < groups.to; i++) {
            int64_t r = i / G, g = i % G, start = starts ? starts[r] : 0, length = position + 1 - start;
            int64_t row = (l * rows * G + i) * m->capacity * K, here = row + position * K;
            place(k + i * K, layer->k_norm, cosines, sines, K, m->norm_eps);
            memcpy(m->keys + here, k + i * K, K * sizeof(float));
            memcpy(m->values + here, v + i * K, K * sizeof(float));
            for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++) {
                int64_t own = (r * H + h) * K, from = row + start * K;
                place(q + own, layer->q_norm, cosines, sines, K, m->norm_eps);
                attend(mixed + own, q + own, m->keys + from, m->values + from, weights, length, K);
            }
        }
        WAIT_FOR_ALL();
        add_linear(x, mixed, layer->o, rows, D, H * K, columns, normed);
        WAIT_FOR_ALL();
        for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, layer->post_norm, D, m->norm_eps);
        linear(gate, normed, layer->gate, rows, F, D, hidden);
        linear(up, normed, layer->up, rows, F, D, hidden);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = r * F + hidden.from; i < r * F + hidden.to; i++)
                gate[i] *= up[i] / (1 + exponential(-gate[i]));
        WAIT_FOR_ALL();
        add_linear(x, gate, layer->down, rows, D, F, columns, normed);
        WAIT_FOR_ALL();
    }
    for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, m->final_norm, D, m->norm_eps);
    linear(logits, normed, m->vocabulary, rows, m->vocab_size, D, share_of(m->vocab_size, thread, threads));
}

/* The same by so many threads, if the compiler knows of any. */
void decode(const Model *m, const int64_t *ids, const int64_t *starts, int64_t position, float *logits, float *scratch,
            int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        decode_share(m, ids, starts, position, logits, scratch, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    decode_share(m, ids, starts, position, logits, scratch, 0, 1);
}
