/* Decoding on a processor: what comes after the next tokens of some texts, which go into the key/value cache.

   It is the model of model.py for a few positions, read from its own float32 parameters. A small model in PyTorch spends
   four fifths of such a step between the operations; here it is as fast as the weights can be read. Threads share out
   the outputs of each product, so that each weight is read by one of them, and wait for each other five times a layer.

   Axes as everywhere: T tokens of each text, D hidden, H heads, G key/value heads, K head width, F feed-forward, V
   vocabulary. A row is one token of one text. */

#include "likeliest.h"
#include "model.h"
#include "products.h"

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
    union { uint32_t bits; float value; } power = {(uint32_t)((int32_t)n + 127) << 23};
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

/* Floats of working memory that `decode` needs for so many texts, tokens of each and threads. */
int64_t decode_scratch(const Model *m, int64_t texts, int64_t length, int64_t threads) {
    int64_t D = m->hidden_size, H = m->num_heads, G = m->num_kv_heads, K = m->head_dim, F = m->intermediate_size;
    int64_t found = 2 * threads * texts * (int64_t)(sizeof(Found) / sizeof(float));
    int64_t together = texts * length * (D + 2 * H * K + 2 * G * K + 2 * F) + texts * m->vocab_size;
    return found + together + threads * (texts * length * D + m->capacity + D);
}

/* As thread `thread` of `threads`. */
static void decode_share(const Model *m, const Reading *reading, int64_t thread, int64_t threads) {
    int64_t D = m->hidden_size, H = m->num_heads, G = m->num_kv_heads, K = m->head_dim, F = m->intermediate_size;
    int64_t T = reading->length, texts = reading->texts, rows = texts * T;
    Found *found = (Found *)reading->scratch;
    float *logits = reading->logits ? reading->logits : (float *)(found + 2 * threads * texts);
    float *x = (float *)(found + 2 * threads * texts) + texts * m->vocab_size;
    float *q = x + rows * D, *mixed = q + rows * H * K, *k = mixed + rows * H * K, *v = k + rows * G * K;
    float *gate = v + rows * G * K, *up = gate + rows * F;
    float *normed = up + rows * F + thread * (rows * D + m->capacity + D), *weights = normed + rows * D; /* its own */
    int16_t *whole = (int16_t *)(weights + m->capacity);
    Share columns = share_of(D, thread, threads), hidden = share_of(F, thread, threads);

    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = columns.from; i < columns.to; i++) x[r * D + i] = m->embedding[reading->ids[r] * D + i];
    WAIT_FOR_ALL();
    for (int64_t l = 0; l < m->num_layers; l++) {
        const Layer *layer = &m->layers[l];
        for (int64_t r = 0; r < rows; r++) rms_norm(normed + r * D, x + r * D, layer->input_norm, D, m->norm_eps);
        linear(q, normed, layer->q, rows, H * K, D, share_of(H * K, thread, threads));
        linear(k, normed, layer->k, rows, G * K, D, share_of(G * K, thread, threads));
        linear(v, normed, layer->v, rows, G * K, D, share_of(G * K, thread, threads));
        WAIT_FOR_ALL();
        /* Heads are dealt out one by one; of a single token each thread matches the very keys it has put in place. */
        for (int64_t i = thread; i < texts * G; i += threads)
            for (int64_t t = 0; t < T; t++) {
                int64_t position = reading->position + t, from = ((i / G * T + t) * G + i % G) * K;
                int64_t to = ((l * m->batch_size * G + i) * m->capacity + position) * K;
                const float *cosines = m->rotary + position * K;
                place(k + from, layer->k_norm, cosines, cosines + m->num_positions * K, K, m->norm_eps);
                memcpy(m->keys + to, k + from, K * sizeof(float));
                memcpy(m->values + to, v + from, K * sizeof(float));
            }
        if (T > 1) {
            WAIT_FOR_ALL();
        }
        for (int64_t unit = thread; unit < texts * G * T; unit += threads) {
            int64_t i = unit / T, t = unit % T, b = i / G, g = i % G, position = reading->position + t;
            int64_t start = reading->starts ? reading->starts[b] : 0;
            int64_t first = ((l * m->batch_size * G + i) * m->capacity + start) * K;
            const float *cosines = m->rotary + position * K, *sines = cosines + m->num_positions * K;
            for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++) {
                int64_t own = ((b * T + t) * H + h) * K;
                place(q + own, layer->q_norm, cosines, sines, K, m->norm_eps);
                attend(mixed + own, q + own, m->keys + first, m->values + first, weights, position + 1 - start, K);
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
    for (int64_t b = 0; b < texts; b++)
        rms_norm(normed + b * D, x + (b * T + T - 1) * D, m->final_norm, D, m->norm_eps);
    score(m, reading, normed, logits, whole, found, thread, threads);
}

static void decode_once(const Model *m, const Reading *reading, int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        decode_share(m, reading, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    decode_share(m, reading, 0, 1);
}

/* Read by so many threads, if the compiler knows of any. */
void decode(const Model *m, const Reading *reading, int64_t threads) {
    Reading next = *reading;
    for (int64_t step = 0;; step++) {
        decode_once(m, &next, threads);
        if (step + 1 >= reading->steps) return;
        for (int64_t b = 0; b < next.texts; b++) {
            if (next.likeliest[b] >= 0) continue;
            for (int64_t rest = b; rest < (reading->steps - step) * next.texts; rest++) next.likeliest[rest] = -1;
            return;
        }
        next.position += next.length;
        next.length = 1;
        next.ids = next.likeliest;
        next.likeliest += next.texts;
    }
}

/* Fill `coarse`, `steps` and `errors` from the vocabulary as it is now. */
void prepare_likeliest(const Model *m, int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        make_coarse(m, share_of(m->vocab_size, omp_get_thread_num(), omp_get_num_threads()));
        return;
    }
#endif
    make_coarse(m, (Share){0, m->vocab_size});
}
