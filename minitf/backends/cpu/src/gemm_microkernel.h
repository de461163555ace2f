/* The microkernel of matrix products: a tile of C = A B, by AMX or by vectors.
 *
 * Operands are arrays of words along the axis that is summed over (vec.h). B, the right operand, is in panels of
 * PANEL columns: word p of column c of panel n, of P words a column, is B[(n * P + p) * PANEL + c]. A, the left
 * operand, is rows in place, a panel, or the order that AMX reads fastest. */
#pragma once
#include "vec.h"

#define PANEL (2 * LANES)

/* Word p of row m is at A[m * row + p / LANES * step + p % LANES * next]. */
typedef struct {
    const word *A;
    int64_t row, step, next;
} Left;

static inline Left from_row(Left left, int64_t row) {
    left.A += row * left.row;
    return left;
}

/* Blocks of LANES words of PANEL rows: `strip_of` and, for AMX, `left_of` make them. */
static inline Left blocks_as_left(const word *blocks) { return (Left){blocks, LANES, PANEL * LANES, 1}; }

static inline Left rows_as_left(const scalar *rows, int64_t scalars) {
    return (Left){(const word *)rows, scalars / WORD_SCALARS, LANES, 1};
}

/* sum += a * b, of a word a in all lanes */
#ifdef BFLOAT16
typedef __m512bh word_vec;
static inline vec add_products(vec sum, word a, word_vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), b);
}
#else
typedef vec word_vec;
static inline vec add_products(vec sum, word a, word_vec b) { return sum + a * b; }
#endif

/* Without this the compiler loads two vectors of float32 again for each row. */
#if defined(BFLOAT16) || !defined(__x86_64__)
#define KEEP_IN_REGISTERS(a, b)
#elif AVX512
#define KEEP_IN_REGISTERS(a, b) __asm__("" : "+v"(a), "+v"(b))
#else
#define KEEP_IN_REGISTERS(a, b) __asm__("" : "+x"(a), "+x"(b))
#endif

#define VECTOR_ROWS (AVX512 ? 8 : 4) /* whose sums fill half of the registers */

/* VECTOR_ROWS rows of PANEL columns of C = A B (with `add`: C += A B), summed over words [from, to). */
static inline void vector_tile(Left left, const word *B, int64_t from, int64_t to, float *C, int64_t C_row, int add) {
    vec sums[VECTOR_ROWS][2];
#pragma GCC unroll 8
    for (int m = 0; m < VECTOR_ROWS; m++) {
        sums[m][0] = add ? load_vec(C + m * C_row) : all(0);
        sums[m][1] = add ? load_vec(C + m * C_row + LANES) : all(0);
    }
    int64_t run = left.step == LANES * left.next ? to - from : LANES; /* words at equal distances */
    for (int64_t begin = from; begin < to; begin += run) {
        const word *A = left.A + begin / LANES * left.step + begin % LANES * left.next;
        for (int64_t p = begin; p < MIN(to, begin + run); p++, A += left.next) {
            word_vec low = *(const word_vec *)(B + p * PANEL), high = *(const word_vec *)(B + p * PANEL + LANES);
            KEEP_IN_REGISTERS(low, high);
#pragma GCC unroll 8
            for (int m = 0; m < VECTOR_ROWS; m++) {
                sums[m][0] = add_products(sums[m][0], A[m * left.row], low);
                sums[m][1] = add_products(sums[m][1], A[m * left.row], high);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < VECTOR_ROWS; m++) {
        store_vec(C + m * C_row, sums[m][0]);
        store_vec(C + m * C_row + LANES, sums[m][1]);
    }
}

#if !defined(BFLOAT16) || !defined(__AMX_TILE__) || !defined(__AMX_BF16__)
#define AMX 0
#define TILE VECTOR_ROWS
#define TILE_WORDS 1 /* `from` and `to` are multiples of this */
#define tile vector_tile
static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}
#else
#define AMX 1
#define TILE 32
#define TILE_WORDS 16

/* AMX: registers of 16 rows of 64 bytes. A Granite Rapids core does 3.6 TFLOP/s with them and 0.12 with vectors. A
 * process has to ask the kernel for permission; where it is refused, vectors read the same operands. */
#include <sys/syscall.h>
#include <unistd.h>

static int has_tiles;

__attribute__((constructor)) static void ask_for_tiles(void) {
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    has_tiles = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Each thread configures its tiles before its first product and releases them after its last: other libraries, such as
 * oneDNN, use their own configuration. */
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

static inline void tile(Left left, const word *B, int64_t from, int64_t to, float *C, int64_t C_row, int add) {
    if (!has_tiles) {
        for (int m = 0; m < TILE; m += VECTOR_ROWS)
            vector_tile(from_row(left, m), B, from, to, C + m * C_row, C_row, add);
        return;
    }
    int64_t A_bytes = left.row * sizeof *left.A, B_bytes = PANEL * sizeof *B, C_bytes = C_row * sizeof *C;
    __asm__ volatile("" ::: "memory"); /* the compiler does not know what the intrinsics below read */
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
    for (int64_t p = from; p < to; p += TILE_WORDS) {
        const word *A = left.A + p / LANES * left.step;
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
