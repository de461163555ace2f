#pragma once

/* Products of a few vectors with the rows of a matrix, each thread computing its share of the outputs. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define WAIT_FOR_ALL() _Pragma("omp barrier")
#else
#define WAIT_FOR_ALL()
#endif

/* Floats in one vector, as many as a register holds. gcc keeps longer vectors in memory: with 16 floats on AVX2, products
   took six times as long. */
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef float Four __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t Order __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (Order){i, j, k, l})
#endif

static inline Four sum_of_fours(Vector v) {
    union { Vector whole; Four parts[WIDTH / 4]; } x = {v};
    Four sum = x.parts[0];
    for (int i = 1; i < WIDTH / 4; i++) sum += x.parts[i];
    return sum;
}

/* The sums of four vectors' lanes, by halving; adding lane by lane would take longer than the products. */
static inline Four sums_of(Vector a, Vector b, Vector c, Vector d) {
    Four qa = sum_of_fours(a), qb = sum_of_fours(b), qc = sum_of_fours(c), qd = sum_of_fours(d);
    Four ab = SHUFFLE(qa, qb, 0, 1, 4, 5) + SHUFFLE(qa, qb, 2, 3, 6, 7);
    Four cd = SHUFFLE(qc, qd, 0, 1, 4, 5) + SHUFFLE(qc, qd, 2, 3, 6, 7);
    return SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
}

static inline float sum(Vector v) {
    Four q = sum_of_fours(v);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

/* y[r][n] = sum_d x[r][d] weight[n][d] for R rows and N outputs at once, so each loaded value is used R or N times. */
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
        for (int r = 0; r < R; r++) {                                                                     \
            float *to = y + r * y_stride;                                                                 \
            if (N % 4 == 0)                                                                               \
                for (int n = 0; n < N; n += 4) {                                                          \
                    Four four = sums_of(sums[r][n], sums[r][n + 1], sums[r][n + 2], sums[r][n + 3]);      \
                    memcpy(to + n, &four, sizeof four);                                                   \
                }                                                                                         \
            else to[0] = sum(sums[r][0]);                                                                 \
            for (int n = 0; n < N; n++)                                                                   \
                for (int64_t rest = d; rest < D; rest++) to[n] += x[r * D + rest] * w[n * D + rest];      \
        }                                                                                                 \
    }
TILE(1, 1)
TILE(1, 8)
#if WIDTH == 16
#define ROWS 4 /* in a tile: as many as keep its sums in registers */
TILE(4, 1)
TILE(4, 4)
#define TILE_OF_ROWS(N) tile_4_##N
#else
#define ROWS 2
TILE(2, 1)
TILE(2, 4)
#define TILE_OF_ROWS(N) tile_2_##N
#endif

/* One thread's share of N outputs, [from, to), in multiples of eight. */
typedef struct { int64_t from, to; } Share;
static Share share_of(int64_t N, int64_t thread, int64_t threads) {
    int64_t eights = (N + 7) / 8, to = (thread + 1) * eights / threads * 8;
    return (Share){thread * eights / threads * 8, to < N ? to : N};
}

/* y = x weight^T for a share of the outputs: x (rows, D), weight (N, D), y (rows, N). Each weight is read
   once. */
static void linear(float *y, const float *x, const float *weight, int64_t rows, int64_t N, int64_t D, Share share) {
    int64_t many = rows >= ROWS ? 4 : 8;
    for (int64_t n = share.from; n < share.to; n += many) {
        if (n + many > share.to) many = 1;
        const float *w = weight + n * D;
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            (many == 4 ? TILE_OF_ROWS(4) : TILE_OF_ROWS(1))(y + r * N + n, N, x + r * D, w, D);
        for (; r < rows; r++) {
            if (many == 8) tile_1_8(y + r * N + n, N, x + r * D, w, D);
            else for (int64_t i = 0; i < many; i++) tile_1_1(y + r * N + n + i, N, x + r * D, w + i * D, D);
        }
    }
}
