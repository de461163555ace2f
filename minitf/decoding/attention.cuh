/* Attention of decode.cu: one query over the cache, in parts for different blocks, which all blocks put together. */
#pragma once

/* Lanes that take a head's K columns, 8 each: a power of two; so many positions at once in a warp. */
constexpr int LANES = K <= 8 ? 1 : K <= 16 ? 2 : K <= 32 ? 4 : K <= 64 ? 8 : K <= 128 ? 16 : 32;
constexpr int GROUPS = 32 / LANES;

DEVICE Eight eight_at(const float *x, int first, int second) {
    return both(*(const float4 *)(x + first), *(const float4 *)(x + second));
}

/* How a lane turns its 8 columns of a head by the position. */
struct Turn {
    const float *rotary;     /* cosines of the position; the sines come NUM_POSITIONS rows later */
    int column, partner[2]; /* the partners of 4 neighbouring columns are neighbours too, half a head away */
    bool inside;
    DEVICE Turn(const float *rotary, long long position)
        : rotary(rotary + position * K), column(threadIdx.x % LANES * 8), inside(column < K) {
        partner[0] = (column + K / 2) % K, partner[1] = (column + 4 + K / 2) % K;
    }
    /* A query or key as soon as it is there: normalised, if the model does, and turned. */
    DEVICE Eight operator()(const float *from, const float *norm) const {
        Eight own = {}, pair = {}, by_own = {}, by_pair = {};
        if (inside) { /* what needs no waiting comes first */
            by_own = eight_at(rotary, column, column + 4);
            by_pair = eight_at(rotary + (long long)NUM_POSITIONS * K, column, column + 4);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                if (column + j < K / 2) by_pair.at[j] = -by_pair.at[j];
            }
            if (QK_NORM) {
                Eight norm_own = eight_at(norm, column, column + 4), norm_pair = eight_at(norm, partner[0], partner[1]);
#pragma unroll
                for (int j = 0; j < 8; j++) by_own.at[j] *= norm_own.at[j], by_pair.at[j] *= norm_pair.at[j];
            }
            const float4 *at[4] = {(const float4 *)(from + column), (const float4 *)(from + column + 4),
                                   (const float4 *)(from + partner[0]), (const float4 *)(from + partner[1])};
            float4 seen[4];
#pragma unroll
            for (int i = 0; i < 4; i++) seen[i] = load_published(at[i]);
#pragma unroll
            for (int i = 0; i < 4; i++) seen[i] = awaited(at[i], seen[i]);
            own = both(seen[0], seen[1]), pair = both(seen[2], seen[3]);
        }
        float scale = 1;
        if (QK_NORM) {
            float squares = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) squares += own.at[j] * own.at[j];
            scale = rsqrtf(lanes_sum<LANES>(squares) / K + NORM_EPS);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) own.at[j] = (own.at[j] * by_own.at[j] + pair.at[j] * by_pair.at[j]) * scale;
        return own;
    }
};

/* A softmax and the sum of values by it, one position after another (Milakov & Gimelshein, 2018); scores in powers of
   two. */
struct Softmax {
    float largest = LOWEST, total = 0;
    Eight mixed = {};
    DEVICE void add(float score, const Eight &values) {
        float now = fmaxf(largest, score), before = exp2f(largest - now), share = exp2f(score - now);
        largest = now;
        total = total * before + share;
#pragma unroll
        for (int j = 0; j < 8; j++) mixed.at[j] = mixed.at[j] * before + share * values.at[j];
    }
    /* With what the lanes at a distance have. */
    DEVICE void join(int distance) {
        float other = __shfl_xor_sync(~0u, largest, distance), now = fmaxf(largest, other);
        float mine = exp2f(largest - now), theirs = exp2f(other - now);
        largest = now;
        total = total * mine + __shfl_xor_sync(~0u, total, distance) * theirs;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            mixed.at[j] = mixed.at[j] * mine + __shfl_xor_sync(~0u, mixed.at[j], distance) * theirs;
        }
    }
};

DEVICE uint4 narrowed(const Eight &x) {
    return make_uint4(bf16_pair(x.at[0], x.at[1]), bf16_pair(x.at[2], x.at[3]), bf16_pair(x.at[4], x.at[5]),
                      bf16_pair(x.at[6], x.at[7]));
}

/* This block's parts of the context: match, weigh, gather. The newest key and value go into the cache, and count as
   the cache has them. */
DEVICE void attend(Ring &ring, const Arguments &a, const Parts &parts, const Turn &turned, int layer, const float *qkv,
                   float *partials) {
    Shared &shared = ring.shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % LANES * 8, group = lane / LANES;
    bool inside = column < K;
    for (int task = blockIdx.x; task < H * parts.splits; task += BLOCKS) {
        int head = task / parts.splits, split = task % parts.splits, shared_head = head / (H / G);
        if (task != blockIdx.x) threads_meet<THREADS>(); /* the last task's sums have been read */
        Eight q = turned(qkv + head * K, a.q_norm + layer * K);
        float unit = rsqrtf(K) * 1.44269504f; /* log2(e): the powers are of two */
#pragma unroll
        for (int j = 0; j < 8; j++) q.at[j] *= unit;
        auto match = [&](const Eight &key) {
            float score = 0;
#pragma unroll
            for (int j = 0; j < 8; j++) score += q.at[j] * key.at[j];
            return lanes_sum<LANES>(score);
        };
        Softmax softmax;
        for (int part = parts.begin(split); part < parts.begin(split + 1); part++) {
            const char *slot = ring.when_full();
            const bf16 *keys = (const bf16 *)slot, *values = (const bf16 *)(slot + SLOT_BYTES / 2);
            int count = parts.positions(part);
            for (int first = warp * GROUPS; first < count; first += WARPS * GROUPS) {
                int at = first + group;
                bool there = at < count && inside;
                Eight key = {}, value = {};
                if (there) key = widened(*(const uint4 *)(keys + at * K + column));
                if (there) value = widened(*(const uint4 *)(values + at * K + column));
                float score = match(key);
                if (at < count) softmax.add(score, value);
            }
            ring.done();
        }
        if (warp == WARPS - 1 && split == parts.splits - 1) {
            uint4 key = narrowed(turned(qkv + (H + shared_head) * K, a.k_norm + layer * K)), value = {};
            if (inside) {
                const float4 *from = (const float4 *)(qkv + (H + G + shared_head) * K + column);
                value = narrowed(both(awaited(from), awaited(from + 1)));
            }
            float score = match(widened(key));
            if (group == 0) softmax.add(score, widened(value));
            if (group == 0 && inside && head % (H / G) == 0) {
                long long at = (((long long)layer * G + shared_head) * a.capacity + a.position) * K + column;
                *(uint4 *)(a.keys + at) = key;
                *(uint4 *)(a.values + at) = value;
            }
        }
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2) softmax.join(distance);
        if (group == 0 && inside) {
#pragma unroll
            for (int j = 0; j < 8; j++) shared.mixed[warp][column + j] = softmax.mixed.at[j];
        }
        if (lane == 0) shared.largest[warp] = softmax.largest, shared.total[warp] = softmax.total;
        threads_meet<THREADS>();
        float largest = LOWEST;
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.largest[w]);
        for (int k = threadIdx.x; k < K + 2; k += THREADS) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                sum += exp2f(shared.largest[w] - largest) * (k < K ? shared.mixed[w][k] : shared.total[w]);
            }
            publish(partials + task * PARTIAL + k, k == K ? largest : sum);
        }
    }
}

/* What all heads gathered, from the parts of each. */
DEVICE void receive_mixed(float *x, const float *partials, int splits) {
    constexpr int at_once = 5;
    for (int i = threadIdx.x * 2; i < H * K; i += THREADS * 2) {
        const float *from = partials + i / K * splits * PARTIAL;
        float largest = LOWEST, total = 0;
        float2 mixed = {0, 0};
        for (int first = 0; first < splits; first += at_once) {
            float2 sums[at_once], ends[at_once];
#pragma unroll
            for (int j = 0; j < at_once; j++) {
                if (first + j < splits) {
                    sums[j] = load_published((const float2 *)(from + (first + j) * PARTIAL + i % K));
                    ends[j] = load_published((const float2 *)(from + (first + j) * PARTIAL + K));
                }
            }
#pragma unroll
            for (int j = 0; j < at_once; j++) {
                if (first + j < splits) {
                    float2 end = awaited((const float2 *)(from + (first + j) * PARTIAL + K), ends[j]);
                    float2 sum = awaited((const float2 *)(from + (first + j) * PARTIAL + i % K), sums[j]);
                    float now = fmaxf(largest, end.x), before = exp2f(largest - now), share = exp2f(end.x - now);
                    largest = now;
                    total = total * before + end.y * share;
                    mixed.x = mixed.x * before + sum.x * share, mixed.y = mixed.y * before + sum.y * share;
                }
            }
        }
        *(float2 *)(x + place(i) + i % 4) = {mixed.x / total, mixed.y / total};
    }
    threads_meet<THREADS>();
}
