/* Vectors of decode.cu: how they go from block to block, and how one is kept for the tensor cores. */
#pragma once

DEVICE bool missing(float x) { return __float_as_uint(x) == ~0u; }
DEVICE bool missing(float4 x) { return missing(x.x) || missing(x.y) || missing(x.z) || missing(x.w); }
DEVICE bool missing(float2 x) { return missing(x.x) || missing(x.y); }
DEVICE bool missing(unsigned long long x) { return x == ~0ull; }

/* What another block writes at `at`, as soon as it is there. */
template <typename T> DEVICE T awaited(const T *at, T seen) {
    unsigned looks = 0;
    while (missing(seen)) look_again(looks), seen = load_published(at);
    return seen;
}
template <typename T> DEVICE T awaited(const T *at) { return awaited(at, load_published(at)); }

/* At `at` of all replicas of a set. */
DEVICE void publish(float *at, float x) {
    if (missing(x)) x = __uint_as_float(0x7fc00000); /* of what is no number, another pattern */
#pragma unroll
    for (int replica = 0; replica < REPLICAS; replica++) store_published(at + (long long)replica * EXCHANGE, x);
}

DEVICE float low_half(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float high_half(unsigned pair) { return __uint_as_float(pair & 0xffff0000); }

/* Two neighbouring values of the vector that is multiplied next. */
DEVICE void keep(Shared &shared, int i, float first, float second) {
    unsigned pair = bf16_pair(first, second);
    shared.high[i / 2] = pair;
    shared.low[i / 2] = bf16_pair(first - low_half(pair), second - high_half(pair));
}

DEVICE float keep(Shared &shared, int i, float4 x) {
    keep(shared, i, x.x, x.y), keep(shared, i + 2, x.z, x.w);
    return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
}

struct Eight {
    float at[8];
};

DEVICE Eight widened(uint4 x) {
    return {low_half(x.x), high_half(x.x), low_half(x.y), high_half(x.y),
            low_half(x.z), high_half(x.z), low_half(x.w), high_half(x.w)};
}
/* Values of the embedding in the parameters' own type. */
DEVICE float embedded(const void *embedding, long long at) {
    return EMBEDDING_BF16 ? __uint_as_float(((const bf16 *)embedding)[at] << 16) : ((const float *)embedding)[at];
}
DEVICE Eight both(float4 a, float4 b) { return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}; }

/* The sum over `lanes` neighbouring lanes, to all of them. */
template <int lanes = 32> DEVICE float lanes_sum(float x) {
#pragma unroll
    for (int offset = lanes / 2; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/* The columns behind the vector, which meet weights of 0. */
template <int width> DEVICE void keep_nothing_behind(Shared &shared) {
    if constexpr (PADDED(width) > width)
        for (int i = width + threadIdx.x * 2; i < PADDED(width); i += THREADS * 2) keep(shared, i, 0, 0);
}

/* A vector of other blocks, as soon as it is there; returns this thread's part of its sum of squares. */
template <int width> DEVICE float receive(Shared &shared, const float *from) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < (width + THREADS * 4 - 1) / (THREADS * 4); i++) {
        int at = (i * THREADS + threadIdx.x) * 4;
        if (at < width) sum += keep(shared, at, awaited((const float4 *)(from + at)));
    }
    keep_nothing_behind<width>(shared);
    return sum;
}
