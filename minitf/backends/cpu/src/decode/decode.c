/* Decoding on a CPU: read the next tokens of some texts into the key/value cache and score the token after them.

   This is the model of model.py for a few positions, on its own float32 parameters. In PyTorch a small model spends
   four fifths of such a step between the operations; this function runs at the speed at which the weights can be read.
   Threads split the outputs of each product, so each weight is read by one thread; there are five barriers a layer.

   Axes, as everywhere: B texts, T tokens of each, D hidden, H heads, G key/value heads, K head width, F feed-forward,
   V vocabulary. A row is one token of one text. */

#include "products.h"

/* The model, its cache and one call's input and output, as decode_bindings.py passes them. */

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

/* One call: T tokens of each text in, the scores of the next token out. */
typedef struct {
    int64_t texts, length; /* B texts of T tokens each: the first B rows of the cache */
    int64_t position;      /* position of the first token in the cache */
    const int64_t *ids;    /* (B, T) */
    const int64_t *starts; /* (B) first position of each row's text, or null: all start at 0 */
    float *logits;         /* (B, V) */
    float *scratch;        /* decode_scratch() floats */
} Step;

/* x += y weight^T for one share of the columns; `scratch` has the size of x. */
static void add_linear(float *x, const float *y, const float *weight, int64_t rows, int64_t N, int64_t D, Share share,
                       float *scratch) {
    linear(scratch, y, weight, rows, N, D, share);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * N + share.from; i < r * N + share.to; i++) x[i] += scratch[i];
}

/* y = x / rms(x) * weight over `size` values. */
static void rms_norm(float *y, const float *x, const float *weight, int64_t size, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / size + eps);
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
}

/* Normalise one head's query or key, if the model has a weight for it, and rotate it by its position. */
static void norm_and_rotate(float *x, const float *weight, const float *cosines, const float *sines, int64_t K,
                            float eps) {
    if (weight) rms_norm(x, x, weight, K, eps);
    for (int64_t i = 0; i < K / 2; i++) {
        float first = x[i], second = x[K / 2 + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[K / 2 + i] = second * cosines[i] + first * sines[i];
    }
}

/* e^x = 2^n e^r with r = x - n ln 2 and |r| <= ln(2)/2, where the Taylor polynomial errs by a rounding or two. */
static float exponential(float x) {
    x = x < -87 ? -87 : x > 88 ? 88 : x;
    float n = (float)(int32_t)(x * 1.44269504f + (x < 0 ? -0.5f : 0.5f));
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts; n times the first is exact */
    float polynomial = 1 + r * (1 + r * (0.5f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r / 720)))));
    union { uint32_t bits; float value; } power = {(uint32_t)((int32_t)n + 127) << 23};
    return polynomial * power.value;
}

/* N vectors of the weighted sum of the values, kept in registers over all keys. */
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

/* One thread's view of a step: its number, and where the intermediate results lie. */
typedef struct {
    int64_t thread, threads, rows;
    float *x, *q, *k, *v, *mixed, *gate, *up; /* shared by all threads; each writes its share */
    float *normed, *weights;                  /* the thread's own: (rows, D) and (capacity) */
} Work;

static int64_t shared_floats(const Model *m, int64_t rows) {
    return rows * (m->hidden_size + 2 * (m->num_heads + m->num_kv_heads) * m->head_dim + 2 * m->intermediate_size);
}

/* Floats of scratch memory that `decode` needs. */
int64_t decode_scratch(const Model *m, int64_t texts, int64_t length, int64_t threads) {
    int64_t rows = texts * length;
    return shared_floats(m, rows) + threads * (rows * m->hidden_size + m->capacity);
}

static Work work_of(const Model *m, const Step *step, int64_t thread, int64_t threads) {
    int64_t rows = step->texts * step->length, K = m->head_dim, F = m->intermediate_size;
    Work w = {.thread = thread, .threads = threads, .rows = rows, .x = step->scratch};
    w.q = w.x + rows * m->hidden_size;
    w.mixed = w.q + rows * m->num_heads * K;
    w.k = w.mixed + rows * m->num_heads * K;
    w.v = w.k + rows * m->num_kv_heads * K;
    w.gate = w.v + rows * m->num_kv_heads * K;
    w.up = w.gate + rows * F;
    w.normed = step->scratch + shared_floats(m, rows) + thread * (rows * m->hidden_size + m->capacity);
    w.weights = w.normed + rows * m->hidden_size;
    return w;
}

static Share own_share(const Work *w, int64_t N) { return share_of(N, w->thread, w->threads); }

static void norm_rows(const Model *m, const Work *w, const float *weight) {
    int64_t D = m->hidden_size;
    for (int64_t r = 0; r < w->rows; r++) rms_norm(w->normed + r * D, w->x + r * D, weight, D, m->norm_eps);
}

/* Put the new keys and values of a layer into the cache. Heads are dealt out one by one. */
static void fill_cache(const Model *m, const Step *step, const Work *w, int64_t layer) {
    int64_t G = m->num_kv_heads, K = m->head_dim, T = step->length;
    for (int64_t i = w->thread; i < step->texts * G; i += w->threads)
        for (int64_t t = 0; t < T; t++) {
            int64_t position = step->position + t, from = ((i / G * T + t) * G + i % G) * K;
            int64_t to = ((layer * m->batch_size * G + i) * m->capacity + position) * K;
            const float *cosines = m->rotary + position * K, *sines = cosines + m->num_positions * K;
            norm_and_rotate(w->k + from, m->layers[layer].k_norm, cosines, sines, K, m->norm_eps);
            memcpy(m->keys + to, w->k + from, K * sizeof(float));
            memcpy(m->values + to, w->v + from, K * sizeof(float));
        }
}

/* Every query of a layer over the keys up to its own position. For a single token, each thread reads the heads that it
   has put into the cache itself. */
static void attend_all(const Model *m, const Step *step, const Work *w, int64_t layer) {
    int64_t H = m->num_heads, G = m->num_kv_heads, K = m->head_dim, T = step->length;
    for (int64_t unit = w->thread; unit < step->texts * G * T; unit += w->threads) {
        int64_t i = unit / T, t = unit % T, b = i / G, g = i % G, position = step->position + t;
        int64_t start = step->starts ? step->starts[b] : 0;
        int64_t first = ((layer * m->batch_size * G + i) * m->capacity + start) * K;
        const float *cosines = m->rotary + position * K, *sines = cosines + m->num_positions * K;
        for (int64_t h = g * (H / G); h < (g + 1) * (H / G); h++) {
            int64_t at = ((b * T + t) * H + h) * K;
            norm_and_rotate(w->q + at, m->layers[layer].q_norm, cosines, sines, K, m->norm_eps);
            attend(w->mixed + at, w->q + at, m->keys + first, m->values + first, w->weights, position + 1 - start, K);
        }
    }
}

static void attention(const Model *m, const Step *step, const Work *w, int64_t layer) {
    int64_t D = m->hidden_size, queries = m->num_heads * m->head_dim, keys = m->num_kv_heads * m->head_dim;
    const Layer *weights = &m->layers[layer];
    norm_rows(m, w, weights->input_norm);
    linear(w->q, w->normed, weights->q, w->rows, queries, D, own_share(w, queries));
    linear(w->k, w->normed, weights->k, w->rows, keys, D, own_share(w, keys));
    linear(w->v, w->normed, weights->v, w->rows, keys, D, own_share(w, keys));
    WAIT_FOR_ALL();
    fill_cache(m, step, w, layer);
    if (step->length > 1) {
        WAIT_FOR_ALL();
    }
    attend_all(m, step, w, layer);
    WAIT_FOR_ALL();
    add_linear(w->x, w->mixed, weights->o, w->rows, D, queries, own_share(w, D), w->normed);
    WAIT_FOR_ALL();
}

static void feed_forward(const Model *m, const Work *w, int64_t layer) {
    int64_t D = m->hidden_size, F = m->intermediate_size;
    const Layer *weights = &m->layers[layer];
    Share share = own_share(w, F);
    norm_rows(m, w, weights->post_norm);
    linear(w->gate, w->normed, weights->gate, w->rows, F, D, share);
    linear(w->up, w->normed, weights->up, w->rows, F, D, share);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t i = r * F + share.from; i < r * F + share.to; i++)
            w->gate[i] *= w->up[i] / (1 + exponential(-w->gate[i]));
    WAIT_FOR_ALL();
    add_linear(w->x, w->gate, weights->down, w->rows, D, F, own_share(w, D), w->normed);
    WAIT_FOR_ALL();
}

/* What thread `thread` of `threads` does of a step. */
static void decode_share(const Model *m, const Step *step, int64_t thread, int64_t threads) {
    int64_t D = m->hidden_size, V = m->vocab_size, T = step->length;
    Work work = work_of(m, step, thread, threads), *w = &work;
    Share columns = own_share(w, D);
    for (int64_t r = 0; r < w->rows; r++)
        for (int64_t i = columns.from; i < columns.to; i++) w->x[r * D + i] = m->embedding[step->ids[r] * D + i];
    WAIT_FOR_ALL();
    for (int64_t layer = 0; layer < m->num_layers; layer++) {
        attention(m, step, w, layer);
        feed_forward(m, w, layer);
    }
    for (int64_t b = 0; b < step->texts; b++)
        rms_norm(w->normed + b * D, w->x + (b * T + T - 1) * D, m->final_norm, D, m->norm_eps);
    linear(step->logits, w->normed, m->vocabulary, step->texts, V, D, own_share(w, V));
}

/* Read the tokens and write the logits, by `threads` threads if the compiler supports OpenMP. */
void decode(const Model *m, const Step *step, int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        decode_share(m, step, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    decode_share(m, step, 0, 1);
}
