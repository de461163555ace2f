/* What the sources in float32 share. Their loops over a row are written for the compiler to make vectors of them:
 * nothing in them branches, and sums may be taken in any order.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOG2_E 1.44269504f
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* Add rows of `count` values to the first of them, in their order. */
static inline void add_up(int64_t rows, int64_t count, float *x) {
    for (int64_t row = 1; row < rows; row++)
        for (int64_t i = 0; i < count; i++) x[i] += x[row * count + i];
}

/* 2^x by whole powers and a Taylor polynomial; relative error below 3e-7. It is at least 2^-126, from 2^127.5 on
 * infinite, and of a NaN, which no comparison holds for, one. */
static inline float power_of_2(float x) {
    x = x < -126.0f ? -126.0f : x;
    x = x > 128.0f ? 128.0f : x;
    float whole = rintf(x), f = x - whole;
    float p = 1.54035304e-4f;
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_2(-LOG2_E * x)); }

static inline float reciprocal_rms(int64_t D, const float *x, float eps) {
    float squares = 0;
    for (int64_t d = 0; d < D; d++) squares += x[d] * x[d];
    return 1.0f / sqrtf(squares / D + eps);
}

/* dx = gradient of x * r * weight with r = 1 / rms(x), and dweight += that of the weight; dx may be dy. */
static inline void norm_gradient(int64_t D, const float *x, float r, const float *weight, const float *dy, float *dx,
                                 float *dweight) {
    float dots = 0;
    for (int64_t d = 0; d < D; d++) {
        float gu = dy[d] * x[d] * r;
        dweight[d] += gu;
        dots += gu * weight[d];
    }
    float along = dots / D * r;
    for (int64_t d = 0; d < D; d++) dx[d] = r * (dy[d] * weight[d] - x[d] * along);
}

/* A NaN leaves it alone, and so it shows in the powers. */
static inline float maximum(const float *x, int64_t count) {
    float lanes[16], most = -INFINITY;
    for (int i = 0; i < 16; i++) lanes[i] = most;
    int64_t at = 0;
    for (; at + 16 <= count; at += 16)
        for (int i = 0; i < 16; i++) lanes[i] = x[at + i] > lanes[i] ? x[at + i] : lanes[i];
    for (; at < count; at++) most = x[at] > most ? x[at] : most;
    for (int i = 0; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
    return most;
}

/* Memory of the calling thread, kept for the next call. */
static inline void *scratch(size_t bytes) {
    static __thread void *memory;
    static __thread size_t held;
    if (bytes > held) {
        free(memory);
        held = ROUND_UP(bytes, 4096);
        memory = aligned_alloc(64, held);
        if (!memory) {
            perror("minitf's C kernels");
            abort();
        }
    }
    return memory;
}
