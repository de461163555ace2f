/* What decode.cu asks of a multiprocessor beyond C++, each a line or two of PTX.
 *
 * Tests put another file of this name in its place, which does the same on a processor. */
#pragma once

typedef unsigned short bf16;
typedef unsigned long long Barrier; /* in shared memory; counts arrivals and bytes, turn by turn */

#define DEVICE __device__ __forceinline__

DEVICE char *shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}
DEVICE unsigned shared_address(const void *at) { return (unsigned)__cvta_generic_to_shared(at); }

/* Values that other multiprocessors write while the kernel runs: seen where all meet, in the level 2 cache. */
DEVICE float4 load_published(const float4 *at) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(at) : "memory");
    return x;
}
DEVICE float2 load_published(const float2 *at) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(at) : "memory");
    return x;
}
DEVICE unsigned long long load_published(const unsigned long long *at) {
    unsigned long long x;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    return x;
}
DEVICE void store_published(float *at, float x) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(at), "f"(x) : "memory");
}
DEVICE void store_published(unsigned long long *at, unsigned long long x) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(x) : "memory");
}
/* Called between two looks at what is not there yet; a kernel that will wait for ever ends with an error. */
DEVICE void look_again(unsigned &looks) {
    if (++looks == 1u << 25) __trap();
}

/* A barrier's turn ends after `arrivals` arrivals and the bytes that were announced. */
DEVICE void barrier_init(Barrier *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(Barrier *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_arrive_expecting(Barrier *barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
/* Wait for the end of a turn, of which only whether it is odd is known. */
DEVICE void barrier_wait(Barrier *barrier, unsigned odd) {
    unsigned done;
    do {
        asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(shared_address(barrier)), "r"(odd) : "memory");
    } while (!done);
}

/* A copy into shared memory that goes on by itself and tells `barrier`. What passes through here is not needed again
   soon: it leaves the level 2 cache first. */
DEVICE void copy_to_shared(void *to, const void *from, unsigned bytes, Barrier *barrier) {
    unsigned long long policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy) : "memory");
}

/* A barrier of the first `threads` threads. */
template <int threads> DEVICE void threads_meet() { asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory"); }

DEVICE unsigned bf16_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
/* sums[0..1] += high * weights, sums[2..3] += low * weights: of 16 columns, of which a lane gives the pairs of two places,
   and 8 rows, of which it gives one and gets two (mma.m16n8k16, the two parts of the vector in its rows 0 to 7 and 8 to
   15, each eight times). */
DEVICE void multiply_tile(float *sums, unsigned high, unsigned low, unsigned next_high, unsigned next_low, unsigned weights,
                          unsigned next_weights) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(high), "r"(low), "r"(next_high), "r"(next_low), "r"(weights), "r"(next_weights));
}
