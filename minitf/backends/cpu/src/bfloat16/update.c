/* An update: the norm of the gradient, and Muon's step in three parts: gradients are averaged, what comes of it is
 * orthogonalised, the weights move. */
#include "products.h"

#define PIECE 4096 /* values a thread takes at a time */

/* The square root of the sum of all squares of `count` arrays, of `sizes` values each. */
void gradient_norm(int64_t count, const float *const *gradients, const int64_t *sizes, float *norm) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; i++) pieces += (sizes[i] + PIECE - 1) / PIECE;
    float *sums = scratch(pieces * sizeof *sums), *at = sums;
#pragma omp parallel firstprivate(at)
    for (int64_t i = 0; i < count; at += (sizes[i++] + PIECE - 1) / PIECE)
#pragma omp for schedule(static) nowait
        for (int64_t piece = 0; piece < (sizes[i] + PIECE - 1) / PIECE; piece++) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t k = piece * PIECE; k < MIN(sizes[i], (piece + 1) * PIECE); k += LANES) {
                __m512 value = _mm512_maskz_loadu_ps(first(sizes[i] - k), gradients[i] + k);
                squares = _mm512_fmadd_ps(value, value, squares);
            }
            at[piece] = _mm512_reduce_add_ps(squares);
        }
    double total = 0;
    for (int64_t piece = 0; piece < pieces; piece++) total += sums[piece];
    *norm = (float)sqrt(total);
}

/* average += (1 - momentum) (gradient - average), of N matrices of `count` values, the gradients each at its own place;
 * ahead = gradient + momentum (average - gradient): Nesterov's. */
void muon_average(int64_t N, int64_t count, const float *const *gradients, float momentum, float *averages, bf16 *ahead) {
    int64_t pieces = (count + PIECE - 1) / PIECE;
    __m512 share = _mm512_set1_ps(momentum), rest = _mm512_set1_ps(1 - momentum);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * pieces; i++) {
        int64_t n = i / pieces, from = i % pieces * PIECE, to = MIN(count, from + PIECE);
        for (int64_t k = from; k < to; k += LANES) {
            __mmask16 mask = first(to - k);
            __m512 gradient = _mm512_maskz_loadu_ps(mask, gradients[n] + k);
            __m512 average = _mm512_maskz_loadu_ps(mask, averages + n * count + k);
            average = _mm512_fmadd_ps(rest, _mm512_sub_ps(gradient, average), average);
            store_floats(averages + n * count + k, mask, average);
            store(ahead + n * count + k, mask, _mm512_fmadd_ps(share, _mm512_sub_ps(average, gradient), gradient));
        }
    }
}

/* weight = decay weight - rate update */
void muon_move(int64_t N, int64_t count, float *const *weights, const bf16 *updates, float decay, float rate) {
    int64_t pieces = (count + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * pieces; i++) {
        int64_t n = i / pieces, from = i % pieces * PIECE, to = MIN(count, from + PIECE);
        for (int64_t k = from; k < to; k += LANES) {
            __mmask16 mask = first(to - k);
            __m512 kept = _mm512_mul_ps(_mm512_set1_ps(decay), _mm512_maskz_loadu_ps(mask, weights[n] + k));
            __m512 update = load(updates + n * count + k, mask);
            store_floats(weights[n] + k, mask, _mm512_fnmadd_ps(_mm512_set1_ps(rate), update, kept));
        }
    }
}

/* ---- orthogonalising -------------------------------------------------------------------------------------------- */

/* Matrices are kept as panels (products.h) in blocks of 32 by 32: a block over its rows serves products that are summed
 * over rows. The panels of a symmetric matrix over its rows and over its columns are the same, and they serve as the left
 * operand as well as the right one. */
#define BLOCK (PANEL * PANEL)

static void put_over_rows(const bf16 *block, uint32_t *to) {
    for (int r = 0; r < PANEL; r += 2) pair_rows(block + r * PANEL, block + (r + 1) * PANEL, PANEL, to + r / 2 * PANEL, 0);
}

static void put_over_columns(const bf16 *block, uint32_t *to) {
    for (int r = 0; r < PANEL; r += LANES) transpose((const uint32_t *)(block + r * PANEL), PANEL / 2, to + r, PANEL);
}

/* b S + c block, rounded: its rows, and what is over its rows. S is given over its rows, or null. */
static inline void round_block(const float *block, float b, const uint32_t *S, float c, bf16 *rows, uint32_t *over_rows) {
    for (int64_t k = 0; k < BLOCK; k += 2 * PANEL)
#pragma GCC unroll 2
        for (int64_t half = 0; half < PANEL; half += LANES) {
            __m512 row = _mm512_mul_ps(_mm512_set1_ps(c), _mm512_load_ps(block + k + half));
            __m512 next = _mm512_mul_ps(_mm512_set1_ps(c), _mm512_load_ps(block + k + PANEL + half));
            if (S) { /* lower and upper halves of its pairs */
                __m512i two = _mm512_load_si512(S + k / 2 + half);
                __m512i upper = _mm512_and_si512(two, _mm512_set1_epi32(0xffff0000));
                row = _mm512_fmadd_ps(_mm512_set1_ps(b), _mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), row);
                next = _mm512_fmadd_ps(_mm512_set1_ps(b), _mm512_castsi512_ps(upper), next);
            }
            store(rows + k + half, 0xffff, row);
            store(rows + k + PANEL + half, 0xffff, next);
            _mm512_store_si512(over_rows + k / 2 + half, pairs_of(row, next));
        }
}

/* to = a I + b S + c A B: symmetric matrices of `size` rows, of which A B is the same as B A; S may be null. One half is
 * computed, the other is its mirror. `turned` has room for a panel. */
static void symmetric_product(const uint32_t *A, const uint32_t *B, int64_t pairs, int64_t size, float a, float b,
                              const uint32_t *S, float c, uint32_t *turned, uint32_t *to) {
    float block[BLOCK] __attribute__((aligned(64)));
    bf16 rounded[BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < size; i += PANEL) {
        Left left = left_of(A + i * pairs, PANEL, pairs, turned);
        for (int64_t j = 0; j <= i; j += PANEL) {
            product_block(left, B + j * pairs, pairs, block, PANEL, 0);
            int64_t here = (j * size + i * PANEL) / 2, mirrored = (i * size + j * PANEL) / 2;
            for (int r = 0; i == j && r < PANEL; r++) block[r * PANEL + r] += a / c;
            round_block(block, b, S ? S + here : NULL, c, rounded, to + here);
            if (i != j) {
                put_over_columns(rounded, to + mirrored);
                continue;
            }
            /* Here too the one half, or what is not symmetric grows from product to product. */
            for (int r = 1; r < PANEL; r++)
                for (int k = 0; k < r; k++) rounded[r * PANEL + k] = rounded[k * PANEL + r];
            put_over_rows(rounded, to + here);
        }
    }
}

/* y = U V^T of x = U S V^T, by polynomials a x + b x^3 + c x^5 of its singular values, coefficients one after another.
 *
 * One polynomial costs three products, of which two are symmetric. Where x is much longer than wide, two at a time are
 * cheaper: the second one's argument, like the first one's value, is computed from the Gram matrix alone. That is for the
 * last two: of the first, which multiply small values by 8 and 4, the rounded Gram matrix of a gradient that one
 * direction rules leaves values above 2, and from there the next polynomials make hundreds of them. */
static void orthogonalise_one(int64_t R, int64_t C, const bf16 *x, int64_t count, const float *coefficients, bf16 *y) {
    int64_t rows = ROUND_UP(R, PANEL), columns = ROUND_UP(C, PANEL), size = MIN(rows, columns);
    int64_t length = MAX(rows, columns), wide = rows < columns, values = rows * columns, square = size * size;
    uint32_t *over_length = scratch((2 * values + 3 * square + (length + size) * PANEL) * sizeof(bf16));
    uint32_t *over_size = over_length + values / 2, *gram = over_size + values / 2, *first_one = gram + square / 2;
    uint32_t *other = first_one + square / 2, *turned = other + square / 2;
    bf16 *strip = (bf16 *)(turned + length * PANEL / 2);
    float block[BLOCK] __attribute__((aligned(64)));
    __m512 squares = _mm512_setzero_ps();
    for (int64_t k = 0; k < R * C; k += LANES) {
        __m512 v = load(x + k, first(R * C - k));
        squares = _mm512_fmadd_ps(v, v, squares);
    }
    __m512 scale = _mm512_set1_ps(1 / (sqrtf(_mm512_reduce_add_ps(squares)) * 1.01f + 1e-6f));
    for (int64_t i = 0; i < rows; i += PANEL)
        for (int64_t j = 0; j < columns; j += PANEL) {
            for (int64_t k = 0; k < BLOCK; k += LANES) {
                int64_t r = i + k / PANEL, c = j + k % PANEL;
                __m512 v = r < R && c < C ? load(x + r * C + c, first(C - c)) : _mm512_setzero_ps();
                store(strip + k, 0xffff, _mm512_mul_ps(v, scale));
            }
            put_over_rows(strip, (wide ? over_size : over_length) + (j * rows + i * PANEL) / 2);
            put_over_columns(strip, (wide ? over_length : over_size) + (i * columns + j * PANEL) / 2);
        }
    for (int64_t done = 0; done < count;) {
        const uint32_t *polynomial = first_one;
        const float *now = coefficients + 3 * done, *then = now + 3;
        int two = 2 * length > 3 * size && done + 2 == count;
        done += two ? 2 : 1;
        symmetric_product(over_length, over_length, length / 2, size, 0, 0, NULL, 1, turned, gram);
        symmetric_product(gram, gram, size / 2, size, now[0], now[1], gram, now[2], turned, first_one);
        if (two) {
            symmetric_product(first_one, gram, size / 2, size, 0, 0, NULL, 1, turned, other);
            symmetric_product(first_one, other, size / 2, size, 0, 0, NULL, 1, turned, gram);
            symmetric_product(gram, gram, size / 2, size, then[0], then[1], gram, then[2], turned, other);
            symmetric_product(other, first_one, size / 2, size, 0, 0, NULL, 1, turned, gram);
            polynomial = gram;
        }
        /* A strip of 32 rows of x, or of its transpose where it is wide, only changes that strip. */
        for (int64_t s = 0; s < length; s += PANEL) {
            Left left = left_of(over_size + s * size / 2, PANEL, size / 2, turned);
            for (int64_t t = 0; t < size; t += PANEL) {
                product_block(left, polynomial + t * size / 2, size / 2, block, PANEL, 0);
                round_block(block, 0, NULL, 1, strip + t * PANEL, over_length + (t * length + s * PANEL) / 2);
            }
            for (int64_t t = 0; t < size; t += PANEL) {
                const bf16 *strip_block = strip + t * PANEL;
                if (done < count) {
                    put_over_columns(strip_block, over_size + (s * size + t * PANEL) / 2);
                } else if (wide) {
                    for (int64_t r = t; r < MIN(R, t + PANEL); r++)
                        for (int64_t c = s; c < MIN(C, s + PANEL); c++)
                            y[r * C + c] = strip_block[(c - s) * PANEL + r - t];
                } else {
                    for (int64_t r = s; r < MIN(R, s + PANEL); r++)
                        memcpy(y + r * C + t, strip_block + (r - s) * PANEL, MIN(C - t, PANEL) * sizeof(bf16));
                }
            }
        }
    }
}

/* N matrices of R by C, each by one thread. */
void muon_orthogonalise(int64_t N, int64_t R, int64_t C, const bf16 *x, int64_t count, const float *coefficients, bf16 *y) {
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < N; n++) orthogonalise_one(R, C, x + n * R * C, count, coefficients, y + n * R * C);
        end_tiles();
    }
}
