/* Products with a layer's weights, and the gradient of the weights, in bfloat16. */
#include "gemm_blocks.h"

/* Whether `linear` and `feed_forward` are faster than PyTorch's products. */
int has_fast_products(void) {
#if AMX
    return has_tiles;
#else
    return 0;
#endif
}

/* y = x w^T of N rows of K with weights w of M rows of K, or with `transposed` 0 y = x w of weights w of K rows of
 * M; K and M are multiples of 32. */
void linear(int64_t N, int64_t K, int64_t M, const scalar *x, const scalar *w, int64_t transposed, scalar *y) {
    word *shared = scratch(K * M * sizeof(scalar));
#pragma omp parallel
    {
        Block sums;
        int alone = packs_for_itself();
        scalar *strip = private_scratch((PANEL + alone * M) * K * sizeof(scalar));
        word *right = alone ? (word *)(strip + PANEL * K) : shared;
        pack_weights(w, transposed ? M : K, transposed ? K : M, transposed, alone, right);
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < N; n += PANEL) {
            Left left = strip_of(x, N, K, n, strip);
            Prefetch next = prefetch_of(x + (n + PANEL) * K, n + PANEL < N ? K : 0, CACHE_LINE, M / PANEL);
            for (int64_t m = 0; m < M; m += PANEL) {
                product_block(left, right + m * K / 2, K / 2, sums.at, PANEL, 0);
                prefetch_some(&next);
                for (int64_t i = 0; i < MIN(PANEL, N - n); i++)
                    _mm512_stream_si512((void *)(y + (n + i) * M + m), round_row(&sums, i));
            }
        }
        end_tiles();
    }
}

/* ---- the gradient of the weights -------------------------------------------------------------------------------- */

/* One gradient, dy^T x. Threads take panels of one operand, `own`, each its own, and multiply them by all of the other,
 * `shared`. */
typedef struct {
    const scalar *own, *shared;
    int64_t N, R, C;   /* rows of dy and x; of dy and of x a row's scalars, so the size of `out` */
    int64_t own_size, shared_size; /* R and C, or C and R */
    int64_t panels;    /* whether `own` is panels already */
    int own_is_dy, transposed;
    int64_t add;
    float *out, *sums; /* `sums` is the transposed result */
} Gradient;

/* `count` columns of words [from, to) of N rows of C, zeros after the last row: a right operand that sums over the
 * rows, of `words` words. */
static void pack_rows(const scalar *x, int64_t N, int64_t C, int64_t count, int64_t from, int64_t to, int64_t words,
                      word *panels) {
    for (int64_t p = from; p < to; p++) {
        const scalar *row = x + 2 * p * C;
        word *at = panels + (p - from) * PANEL;
        if (2 * p >= N) {
            for (int64_t c = 0; c < count; c += PANEL) memset(at + c * words, 0, PANEL * sizeof *at);
            continue;
        }
        prefetch(row, 32 * C);
        prefetch(row, 33 * C);
        pack_words(row, 2 * p + 1 < N ? row + C : NULL, count, at, words * PANEL);
    }
}

/* A block of `out` (R rows of C) at row r, column c, or as much of it as there is. */
static void put_block(Left left, const word *right, int64_t words, int64_t R, int64_t C, int64_t r, int64_t c, int add,
                      float *out) {
    float *at = out + r * C + c, rest[BLOCK];
    for (int64_t m = 0; m < MIN(PANEL, R - r); m += TILE, at += TILE * C) {
        if (r + m + TILE <= R && c + PANEL <= C) {
            tile(from_row(left, m), right, 0, words, at, C, add);
            continue;
        }
        tile(from_row(left, m), right, 0, words, rest, PANEL, 0);
        for (int64_t i = 0; i < MIN(TILE, R - r - m); i++)
            for (int64_t j = 0; j < MIN(PANEL, C - c); j++)
                at[i * C + j] = (add ? at[i * C + j] : 0) + rest[i * PANEL + j];
    }
}

/* out = x^T, with `add` added to `out`; x has rows of `row` floats. By all threads. */
static void put_transposed(const float *x, int64_t row, int64_t R, int64_t C, int64_t add, float *out) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < R; r += LANES)
        for (int64_t c = 0; c < C; c += LANES) {
            float block[LANES * LANES] __attribute__((aligned(64)));
            transpose((const word *)(x + c * row + r), row, (word *)block, LANES);
            for (int64_t i = 0; i < MIN(LANES, R - r); i++) {
                float *at = out + (r + i) * C + c;
                vec sum = load_vec(block + i * LANES);
                if (add) sum += load_floats(at, first(C - c));
                store_floats(at, first(C - c), sum);
            }
        }
}

/* Pack words [from, from + words) of the shared operand, by all threads or by each `alone`. For AMX it is a left
 * operand; for vectors, which read panels from either side, a right one. `panel` has room for one panel. */
static void pack_shared(const Gradient *g, int64_t from, int64_t words, int alone, word *panel, word *operands) {
    int64_t size = g->shared_size;
#if AMX
    int64_t parts = alone ? 1 : omp_get_num_threads(), part = alone ? 0 : omp_get_thread_num();
    int64_t panels = (size + PANEL - 1) / PANEL;
    for (int64_t s = panels * part / parts * PANEL; s < panels * (part + 1) / parts * PANEL; s += PANEL) {
        pack_rows(g->shared + s, g->N, size, MIN(PANEL, size - s), from, from + words, words, panel);
        left_of(panel, PANEL, words, operands + s * words);
    }
    if (!alone) {
#pragma omp barrier
    }
#else
    (void)alone, (void)panel;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < words; p++)
        pack_rows(g->shared, g->N, size, size, from + p, from + p + 1, words, operands + p * PANEL);
#endif
}

/* Words [from, from + words) of panel o of the thread's own operand times columns [s, to) of the shared one. */
static void multiply_panel(const Gradient *g, int64_t o, int64_t s, int64_t to, int64_t from, int64_t words,
                           word *panel, const word *operands) {
    int64_t blocks = ROUND_UP(g->shared_size, PANEL) / PANEL, O = g->own_size, OP = ROUND_UP(O, PANEL);
    const word *own = g->panels ? (const word *)g->own + from * OP + o * words : panel;
    Prefetch next = prefetch_of(own + words * PANEL, 2 * words, CACHE_LINE, blocks); /* the next panel, */
    if (!g->panels) { /* or the rows it is packed from */
        pack_rows(g->own + o, g->N, O, MIN(PANEL, O - o), from, from + words, words, panel);
        next = prefetch_of(g->own + 2 * from * O + o + PANEL, MIN(2 * words, g->N - 2 * from), 2 * O, blocks);
    }
    for (; s < to; s += PANEL) {
        if (AMX) prefetch_some(&next);
        const word *other = operands + s * words;
        Left left = AMX ? blocks_as_left(other) : left_of(other, PANEL, words, NULL);
        if (g->transposed)
            put_block(left, own, words, ROUND_UP(g->shared_size, PANEL), OP, s, o, from > 0, g->sums);
        else if (g->own_is_dy)
            put_block(left_of(own, PANEL, words, NULL), other, words, g->R, g->C, o, s, g->add || from > 0, g->out);
        else
            put_block(left, own, words, g->R, g->C, s, o, g->add || from > 0, g->out);
    }
}

/* out = dy^T x, with `add` added to `out`, of N rows of R scalars dy and of C scalars x.
 *
 * WORDS words at a time, the threads pack one operand for all; then each takes panels of the other, its own, and
 * multiplies. With fewer panels than threads, several threads take the same one and each a share of the shared
 * operand. Vectors read panels from either side, and x is shared. AMX reads rows on the left: there the narrower
 * operand is shared, and the wider one is a right operand, packed here or given as panels (`panels` 1: dy, 2: x), as
 * feed_forward_backward makes them. Where x is on the left, the result is transposed. */
void weight_gradient(int64_t N, int64_t R, int64_t C, const scalar *dy, const scalar *x, int64_t panels, int64_t add,
                     float *out) {
    int own_is_dy = panels ? panels == 1 : !AMX || R > C;
    Gradient g = {own_is_dy ? dy : x, own_is_dy ? x : dy, N, R, C, own_is_dy ? R : C, own_is_dy ? C : R,
                  panels, own_is_dy, AMX && own_is_dy, add, out, NULL};
    int64_t SP = ROUND_UP(g.shared_size, PANEL), OP = ROUND_UP(g.own_size, PANEL), units = OP / PANEL;
    int64_t total = ROUND_UP((N + 1) / 2, panels ? LANES : TILE_WORDS);
    int64_t shares = (omp_get_max_threads() + units - 1) / units;
    int64_t share = ROUND_UP((g.shared_size + shares - 1) / shares, PANEL);
    word *both = scratch((2 * WORDS * SP + g.transposed * SP * OP) * sizeof(word));
    g.sums = (float *)(both + 2 * WORDS * SP);
#pragma omp parallel
    {
        word panel[WORDS * PANEL] __attribute__((aligned(64)));
        int alone = packs_for_itself();
        word *mine = alone ? private_scratch(WORDS * SP * sizeof *mine) : NULL;
        begin_tiles();
        for (int64_t from = 0; from < total; from += WORDS) {
            int64_t words = MIN(WORDS, total - from);
            /* In two places by turns: other threads may still read the previous operands. */
            word *operands = alone ? mine : both + from / WORDS % 2 * WORDS * SP;
            pack_shared(&g, from, words, alone, panel, operands);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < units * shares; i++) {
                int64_t s = i % shares * share;
                multiply_panel(&g, i / shares * PANEL, s, MIN(g.shared_size, s + share), from, words, panel, operands);
            }
        }
        end_tiles();
        if (g.transposed) {
#pragma omp barrier
            put_transposed(g.sums, OP, R, C, add, out);
        }
    }
}
