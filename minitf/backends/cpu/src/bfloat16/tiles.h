/* The innermost part of a matrix product: a tile of the result, by AMX or by vectors.
 *
 * Either multiplies pairs of bfloat16 that lie side by side and adds them up: operands are arrays of pairs along the axis
 * that is summed over. The right one is in panels of 32 columns: pair p of column c of panel n at B[(n * P + p) * 32 + c].
 * The left one is rows as they lie, or a panel, or such as AMX reads best. */
#pragma once
#include "vectors.h"

#define PANEL 32

/* Pair p of row m is at A[m * row + p / 16 * step + p % 16 * pair]. */
typedef struct {
    const uint32_t *A;
    int64_t row, step, pair;
} Left;

static inline Left from_row(Left left, int64_t row) {
    left.A += row * left.row;
    return left;
}

static inline Left turned_left(const uint32_t *turned) { return (Left){turned, LANES, PANEL * LANES, 1}; }

static inline Left rows_as_left(const bf16 *rows, int64_t values) {
    return (Left){(const uint32_t *)rows, values / 2, LANES, 1};
}

/* 8 rows of 32 columns of C = A B (with `add`: C += A B), summed over the pairs `from` to `to`. */
static inline void vector_tile(Left left, const uint32_t *B, int64_t from, int64_t to, float *C, int64_t C_row, int add) {
    __m512 sums[8][2];
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) {
        sums[m][0] = add ? _mm512_loadu_ps(C + m * C_row) : _mm512_setzero_ps();
        sums[m][1] = add ? _mm512_loadu_ps(C + m * C_row + LANES) : _mm512_setzero_ps();
    }
    int64_t run = left.step == LANES * left.pair ? to - from : LANES; /* pairs that are equally far from each other */
    for (int64_t begin = from; begin < to; begin += run) {
        const uint32_t *A = left.A + begin / LANES * left.step + begin % LANES * left.pair;
        for (int64_t p = begin; p < MIN(to, begin + run); p++, A += left.pair) {
            __m512bh low = (__m512bh)_mm512_load_si512(B + p * PANEL);
            __m512bh high = (__m512bh)_mm512_load_si512(B + p * PANEL + LANES);
#pragma GCC unroll 8
            for (int m = 0; m < 8; m++) {
                __m512bh a = (__m512bh)_mm512_set1_epi32(A[m * left.row]);
                sums[m][0] = _mm512_dpbf16_ps(sums[m][0], a, low);
                sums[m][1] = _mm512_dpbf16_ps(sums[m][1], a, high);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < 8; m++) {
        _mm512_storeu_ps(C + m * C_row, sums[m][0]);
        _mm512_storeu_ps(C + m * C_row + LANES, sums[m][1]);
    }
}

#if !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
#define TILE 8      /* rows */
#define TILE_PAIRS 1 /* that are summed over at a time: `from` and `to` are multiples */
#define AMX 0
#define tile vector_tile
static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}
#else
#define AMX 1
#define TILE 32
#define TILE_PAIRS 16

/* AMX: registers of 16 rows of 64 bytes. On a Granite Rapids a core does 3.6 TFLOP/s with them and 0.12 with vectors.
 * The kernel lets a process use them that asks; where it refuses, vectors read the same operands. */
#include <sys/syscall.h>
#include <unistd.h>

static int has_tiles;

__attribute__((constructor)) static void ask_for_tiles(void) {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    has_tiles = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Each thread says how large its tiles are before its first product, and lets go of them after its last: others, such as
 * oneDNN, set their own. */
static inline void begin_tiles(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } sizes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (has_tiles) _tile_loadconfig(&sizes);
}

static inline void end_tiles(void) {
    if (has_tiles) _tile_release();
}

static inline void tile(Left left, const uint32_t *B, int64_t from, int64_t to, float *C, int64_t C_row, int add) {
    if (!has_tiles) {
        for (int m = 0; m < TILE; m += 8) vector_tile(from_row(left, m), B, from, to, C + m * C_row, C_row, add);
        return;
    }
    int64_t A_bytes = left.row * sizeof *left.A, B_bytes = PANEL * sizeof *B, C_bytes = C_row * sizeof *C;
    __asm__ volatile("" ::: "memory"); /* the functions below do not say what they read */
    if (add) {
        _tile_loadd(0, C, C_bytes);
        _tile_loadd(1, C + LANES, C_bytes);
        _tile_loadd(2, C + LANES * C_row, C_bytes);
        _tile_loadd(3, C + LANES * C_row + LANES, C_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t p = from; p < to; p += TILE_PAIRS) {
        const uint32_t *A = left.A + p / LANES * left.step;
        _tile_loadd(4, A, A_bytes);
        _tile_loadd(6, B + p * PANEL, B_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, B + p * PANEL + LANES, B_bytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, A + LANES * left.row, A_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, C_bytes);
    _tile_stored(1, C + LANES, C_bytes);
    _tile_stored(2, C + LANES * C_row, C_bytes);
    _tile_stored(3, C + LANES * C_row + LANES, C_bytes);
    __asm__ volatile("" ::: "memory");
}
#endif
