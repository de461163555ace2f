/* Muon's update in three parts: average the gradients, orthogonalise the result, move the weights. Weights and averages
 * are float32; products are bfloat16.
 */
#include "gemm_blocks.h"

/* average += (1 - momentum) (gradient - average), of N matrices of `count` floats, whose gradients are separate arrays;
 * ahead = gradient + momentum (average - gradient), Nesterov's. */
void muon_average(int64_t N, int64_t count, const float *const *gradients, float momentum, float *averages,
                  scalar *ahead) {
    int64_t pieces = (count + ELEMENTS_AT_ONCE - 1) / ELEMENTS_AT_ONCE;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * pieces; i++) {
        int64_t n = i / pieces, from = i % pieces * ELEMENTS_AT_ONCE, to = MIN(count, from + ELEMENTS_AT_ONCE);
        for (int64_t k = from; k < to; k += LANES) {
            lanes some = first(to - k);
            vec gradient = load_floats(gradients[n] + k, some), average = load_floats(averages + n * count + k, some);
            average += (1 - momentum) * (gradient - average);
            store_floats(averages + n * count + k, some, average);
            store(ahead + n * count + k, some, gradient + momentum * (average - gradient));
        }
    }
}

/* weight = decay weight - rate update */
void muon_move(int64_t N, int64_t count, float *const *weights, const scalar *updates, float decay, float rate) {
    int64_t pieces = (count + ELEMENTS_AT_ONCE - 1) / ELEMENTS_AT_ONCE;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N * pieces; i++) {
        int64_t n = i / pieces, from = i % pieces * ELEMENTS_AT_ONCE, to = MIN(count, from + ELEMENTS_AT_ONCE);
        for (int64_t k = from; k < to; k += LANES) {
            lanes some = first(to - k);
            vec weight = load_floats(weights[n] + k, some) * decay;
            store_floats(weights[n] + k, some, weight - rate * load(updates + n * count + k, some));
        }
    }
}

/* ---- orthogonalising -------------------------------------------------------------------------------------------- */

/* Matrices are kept as panels (panels.h) in blocks of 32 by 32: panels over the rows serve products that sum over
 * rows. The panels of a symmetric matrix over its rows and over its columns are equal, and serve as either operand. */

/* b S + c block, rounded: as rows, and over its rows. S is a block over its rows, or null. */
static inline void round_block(const Block *block, float b, const word *S, float c, scalar *rows, word *over_rows) {
    for (int64_t k = 0; k < BLOCK; k += 2 * PANEL)
#pragma GCC unroll 2
        for (int64_t half = 0; half < PANEL; half += LANES) {
            vec row = load_vec(block->at + k + half) * c, next = load_vec(block->at + k + PANEL + half) * c;
            if (S) { /* lower and upper halves of its words */
                __m512i both = _mm512_load_si512(S + k / 2 + half);
                row += b * _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
                next += b * _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)));
            }
            store(rows + k + half, first(LANES), row);
            store(rows + k + PANEL + half, first(LANES), next);
            _mm512_store_si512(over_rows + k / 2 + half, words_of(row, next));
        }
}

/* to = a I + b S + c A B, symmetric matrices of `size` rows of which A B = B A; S may be null. One half is computed and
 * mirrored. `left_words` has room for a panel. */
static void symmetric_product(const word *A, const word *B, int64_t words, int64_t size, float a, float b,
                              const word *S, float c, word *left_words, word *to) {
    Block block;
    scalar rounded[BLOCK] __attribute__((aligned(64)));
    for (int64_t i = 0; i < size; i += PANEL) {
        Left left = left_of(A + i * words, PANEL, words, left_words);
        for (int64_t j = 0; j <= i; j += PANEL) {
            product_block(left, B + j * words, words, block.at, PANEL, 0);
            int64_t at = (j * size + i * PANEL) / 2, mirrored = (i * size + j * PANEL) / 2;
            for (int r = 0; i == j && r < PANEL; r++) block.at[r * PANEL + r] += a / c;
            round_block(&block, b, S ? S + at : NULL, c, rounded, to + at);
            if (i != j) {
                panels_over_columns(rounded, PANEL, PANEL, to + mirrored);
                continue;
            }
            /* Mirror blocks on the diagonal too, or asymmetry grows from product to product. */
            for (int r = 1; r < PANEL; r++)
                for (int k = 0; k < r; k++) rounded[r * PANEL + k] = rounded[k * PANEL + r];
            panels_over_rows(rounded, PANEL, PANEL, to + at);
        }
    }
}

/* A matrix x of R by C: `length` and `size` are its longer and shorter side, padded. */
typedef struct {
    int64_t R, C, rows, columns, length, size;
    int wide;
    word *over_length, *over_size; /* x as panels over either side */
    word *gram, *first_one, *other; /* symmetric matrices */
    word *left_words;              /* a left operand of length or size */
    scalar *strip;                 /* PANEL rows of it */
} Matrix;

static Matrix matrix_of(int64_t R, int64_t C) {
    int64_t rows = ROUND_UP(R, PANEL), columns = ROUND_UP(C, PANEL), size = MIN(rows, columns);
    int64_t length = MAX(rows, columns), words = rows * columns / 2, square = size * size / 2;
    word *at = scratch((2 * words + 3 * square) * sizeof *at + (length + size) * PANEL * sizeof(scalar));
    word *gram = at + 2 * words, *left_words = gram + 3 * square;
    return (Matrix){R, C, rows, columns, length, size, rows < columns, at, at + words, gram, gram + square,
                    gram + 2 * square, left_words, (scalar *)(left_words + length * PANEL / 2)};
}

/* x / (1.01 norm), whose singular values are below 1, as panels over both sides. */
static void pack_normalised(const Matrix *m, const scalar *x) {
    int64_t R = m->R, C = m->C;
    float scale = 1 / (sqrtf(sum_of_squares(x, R * C)) * 1.01f + 1e-6f);
    word *over_rows = m->wide ? m->over_size : m->over_length, *over_columns = m->wide ? m->over_length : m->over_size;
    for (int64_t i = 0; i < m->rows; i += PANEL)
        for (int64_t j = 0; j < m->columns; j += PANEL) {
            for (int64_t k = 0; k < BLOCK; k += LANES) {
                int64_t r = i + k / PANEL, c = j + k % PANEL;
                vec v = all(0);
                if (r < R && c < C) v = load(x + r * C + c, first(C - c));
                store(m->strip + k, first(LANES), v * scale);
            }
            panels_over_rows(m->strip, PANEL, PANEL, over_rows + (j * m->rows + i * PANEL) / 2);
            panels_over_columns(m->strip, PANEL, PANEL, over_columns + (i * m->columns + j * PANEL) / 2);
        }
}

/* a I + b G + c G^2 of the Gram matrix G of x, which times x is a x + b x^3 + c x^5: three `coefficients`; with
 * `two` the next three are applied to the result. */
static const word *polynomial_of(const Matrix *m, const float *coefficients, int two) {
    const float *now = coefficients, *then = coefficients + 3;
    int64_t size = m->size;
    word *room = m->left_words;
    symmetric_product(m->over_length, m->over_length, m->length / 2, size, 0, 0, NULL, 1, room, m->gram);
    symmetric_product(m->gram, m->gram, size / 2, size, now[0], now[1], m->gram, now[2], room, m->first_one);
    if (!two) return m->first_one;
    symmetric_product(m->first_one, m->gram, size / 2, size, 0, 0, NULL, 1, room, m->other);
    symmetric_product(m->first_one, m->other, size / 2, size, 0, 0, NULL, 1, room, m->gram);
    symmetric_product(m->gram, m->gram, size / 2, size, then[0], then[1], m->gram, then[2], room, m->other);
    symmetric_product(m->other, m->first_one, size / 2, size, 0, 0, NULL, 1, room, m->gram);
    return m->gram;
}

/* Block t of strip s of the result. */
static void put_result(const Matrix *m, int64_t s, int64_t t, scalar *y) {
    const scalar *block = m->strip + t * PANEL;
    if (m->wide) {
        for (int64_t r = t; r < MIN(m->R, t + PANEL); r++)
            for (int64_t c = s; c < MIN(m->C, s + PANEL); c++) y[r * m->C + c] = block[(c - s) * PANEL + r - t];
    } else {
        for (int64_t r = s; r < MIN(m->R, s + PANEL); r++)
            memcpy(y + r * m->C + t, block + (r - s) * PANEL, MIN(m->C - t, PANEL) * sizeof *y);
    }
}

/* x = polynomial x, or the same of its transpose if it is wide, in place: a strip of PANEL rows depends on itself
 * alone. With y the result goes there. */
static void apply(const Matrix *m, const word *polynomial, scalar *y) {
    Block block;
    int64_t size = m->size, length = m->length;
    for (int64_t s = 0; s < length; s += PANEL) {
        Left left = left_of(m->over_size + s * size / 2, PANEL, size / 2, m->left_words);
        for (int64_t t = 0; t < size; t += PANEL) {
            product_block(left, polynomial + t * size / 2, size / 2, block.at, PANEL, 0);
            round_block(&block, 0, NULL, 1, m->strip + t * PANEL, m->over_length + (t * length + s * PANEL) / 2);
        }
        for (int64_t t = 0; t < size; t += PANEL) {
            if (y)
                put_result(m, s, t, y);
            else
                panels_over_columns(m->strip + t * PANEL, PANEL, PANEL, m->over_size + (s * size + t * PANEL) / 2);
        }
    }
}

/* y = U V^T of x = U S V^T, by polynomials a x + b x^3 + c x^5 of its singular values, with `coefficients` a, b, c each
 * (Polar Express).
 *
 * A polynomial costs three products, two of them symmetric. Where x is much longer than wide, applying two at once
 * is cheaper: the argument of the second, like the value of the first, follows from the Gram matrix alone. This is
 * safe for the last two only: the first ones multiply small singular values by 8 and 4, and where one direction
 * rules a gradient its rounded Gram matrix leaves values above 2, which the next polynomials blow up to hundreds. */
static void orthogonalise_one(int64_t R, int64_t C, const scalar *x, int64_t count, const float *coefficients,
                              scalar *y) {
    Matrix m = matrix_of(R, C);
    pack_normalised(&m, x);
    for (int64_t done = 0; done < count;) {
        int two = 2 * m.length > 3 * m.size && done + 2 == count;
        const word *polynomial = polynomial_of(&m, coefficients + 3 * done, two);
        done += two ? 2 : 1;
        apply(&m, polynomial, done < count ? NULL : y);
    }
}

/* N matrices of R by C, each by one thread. */
void muon_orthogonalise(int64_t N, int64_t R, int64_t C, const scalar *x, int64_t count, const float *coefficients,
                        scalar *y) {
#pragma omp parallel
    {
        begin_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < N; n++) orthogonalise_one(R, C, x + n * R * C, count, coefficients, y + n * R * C);
        end_tiles();
    }
}
