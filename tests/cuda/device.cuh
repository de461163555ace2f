/* What decode.cu asks of a GPU, on a processor: every thread is a fiber, and all take turns in random order.
 *
 * Found before the real file of this name, it lets the kernel's tests run on any machine. A fiber goes on until it has
 * to wait for others, so what is read before it was written is found, whatever the order on a GPU happens to be. Copies
 * into shared memory arrive some rounds later. */
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

typedef unsigned short bf16;
struct Barrier {
    int expected, arrived;
    long long bytes;
    unsigned turn;
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

/* Fibers */
struct Index { unsigned x; };
struct Meeting { /* of a warp or of a block's threads */
    int arrived = 0;
    unsigned turn = 0;
};
struct Warp {
    Meeting meeting;
    uint64_t given[32], seen[32];
};
struct Copy { void *to; const void *from; unsigned bytes; Barrier *barrier; };
struct Fiber {
    ucontext_t context;
    Index thread, block;
    bool done = false;
    std::unique_ptr<char[]> stack;
};
static ucontext_t scheduler;
static Fiber *running;
static std::vector<Warp> warps;
static std::vector<Meeting> all_meetings, some_meetings;
static std::vector<char *> memories;
static std::deque<Copy> copies;
static int warps_per_block;
#define threadIdx (running->thread)
#define blockIdx (running->block)

inline void others_first() { swapcontext(&running->context, &scheduler); }
inline void meet(Meeting &meeting, int expected) {
    unsigned turn = meeting.turn;
    if (++meeting.arrived == expected) meeting.arrived = 0, meeting.turn++;
    while (meeting.turn == turn) others_first();
}
inline Warp &own_warp() { return warps[blockIdx.x * warps_per_block + threadIdx.x / 32]; }
inline void __syncwarp() { meet(own_warp().meeting, 32); }
inline void __syncthreads() { meet(all_meetings[blockIdx.x], warps_per_block * 32); }
template <int threads> void threads_meet() { meet(some_meetings[blockIdx.x], threads); }
template <typename T> T __shfl_xor_sync(unsigned, T x, int distance) {
    Warp &warp = own_warp();
    memcpy(&warp.given[threadIdx.x % 32], &x, sizeof x);
    unsigned turn = warp.meeting.turn;
    if (++warp.meeting.arrived == 32) {
        memcpy(warp.seen, warp.given, sizeof warp.seen);
        warp.meeting.arrived = 0, warp.meeting.turn++;
    }
    while (warp.meeting.turn == turn) others_first();
    memcpy(&x, &warp.seen[(threadIdx.x % 32) ^ distance], sizeof x);
    return x;
}
inline char *shared_memory() { return memories[blockIdx.x]; }

/* Memory and barriers */
template <typename T> T load_published(const T *at) { return *at; }
inline void store_published(float *at, float x) { *at = x; }
inline void store_published(unsigned long long *at, unsigned long long x) { *at = x; }
inline void look_again(unsigned &) { others_first(); }
inline void barrier_init(Barrier *barrier, int arrivals) { *barrier = {arrivals, 0, 0, 0}; }
inline void barriers_ready() {}
inline void turn_if_done(Barrier *barrier) {
    if (barrier->arrived == barrier->expected && barrier->bytes == 0) barrier->arrived = 0, barrier->turn++;
}
inline void barrier_arrive(Barrier *barrier) { barrier->arrived++, turn_if_done(barrier); }
inline void barrier_arrive_expecting(Barrier *barrier, unsigned bytes) {
    barrier->arrived++, barrier->bytes += bytes;
    turn_if_done(barrier);
}
inline void barrier_wait(Barrier *barrier, unsigned odd) {
    while ((barrier->turn & 1) == odd) others_first();
}
inline void copy_to_shared(void *to, const void *from, unsigned bytes, Barrier *barrier) {
    if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16) fprintf(stderr, "a copy not of 16 bytes\n"), abort();
    copies.push_back({to, from, bytes, barrier});
}

/* Numbers */
inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline unsigned rounded(float x) {
    unsigned bits = __float_as_uint(x);
    return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline unsigned bf16_pair(float low, float high) { return rounded(high) << 16 | rounded(low); }
/* A lane gives one row's and the vector's values at its places of 16 columns, and gets two rows' sums. */
inline void multiply_tile(float *sums, unsigned high, unsigned low, unsigned next_high, unsigned next_low, unsigned weights,
                          unsigned next_weights) {
    int lane = threadIdx.x % 32;
    auto half = [](unsigned pair, int which) { return __uint_as_float(which ? pair & 0xffff0000 : pair << 16); };
    auto all = [](unsigned first, unsigned second) {
        std::vector<uint64_t> found(32);
        uint64_t own = (uint64_t)second << 32 | first;
        __shfl_xor_sync(~0u, own, 0);
        memcpy(found.data(), own_warp().seen, sizeof own_warp().seen);
        __syncwarp();
        return found;
    };
    auto vector = all(high, next_high), rest = all(low, next_low), rows = all(weights, next_weights);
    for (int i = 0; i < 2; i++) {
        for (int k = 0; k < 16; k++) { /* lane % 4 has columns 2 t and 2 t + 1, and those 8 further on */
            int from = k % 8 / 2, shift = k / 8 * 32;
            float weight = half(rows[(lane % 4 * 2 + i) * 4 + from] >> shift, k % 2);
            sums[i] += half(vector[lane / 4 * 4 + from] >> shift, k % 2) * weight;
            sums[2 + i] += half(rest[lane / 4 * 4 + from] >> shift, k % 2) * weight;
        }
    }
}
