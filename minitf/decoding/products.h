#pragma once

/* Products of a few vectors with rows of weights, shared out among threads that wait for each other. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define WAIT_FOR_ALL() _Pragma("omp barrier")
#else
#define WAIT_FOR_ALL()
#endif

#define WIDTH 16 /* floats the compiler handles as one value; it splits them for narrower processors */
typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));

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
