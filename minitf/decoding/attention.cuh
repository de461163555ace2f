/* Attention of decode.cu: one query over the cache, in parts for different blocks, which all blocks put together. */
#pragma once

/* Lanes that take a head's K columns, 8 each: a power of two; so many positions at once in a warp. */
constexpr int LANES = K <= 8 ? 1 : K <= 16 ? 2 : K <= 32 ? 4 : K <= 64 ? 8 : K <= 128 ? 16 : 32;
constexpr int GROUPS = 32 / LANES;

DEVICE Eight eight_at(const float *x, int first, int second) {
    return both(*(const float4 *)(x + first), *(const float4 *)(x + second));
}

/* A lane's 8 columns, from `column` on, of a query or key in shared memory: normalised, if the model does, and turned by
   the position. The partners of 4 neighbouring columns are neighbours too, half a head away. */
DEVICE Eight turned(const float *x, const float *turning, const float *norm, int column) {
    bool inside = column < K;
    if (!inside) column = 0; /* all lanes go the same way */
    int first = (column + K / 2) % K, second = (column + 4 + K / 2) % K;
    Eight own = eight_at(x, column, column + 4), pair = eight_at(x, first, second);
    float scale = 1;
    if (QK_NORM) {
        float squares = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) squares += own.at[j] * own.at[j];
        if (!inside) squares = 0;
        scale = rsqrtf(lanes_sum<LANES>(squares) * (1.0f / K) + NORM_EPS);
        Eight norm_own = eight_at(norm, column, column + 4), norm_pair = eight_at(norm, first, second);
#pragma unroll
        for (int j = 0; j < 8; j++) own.at[j] *= norm_own.at[j], pair.at[j] *= norm_pair.at[j];
    }
    Eight cosines = eight_at(turning, column, column + 4), sines = eight_at(turning + K, column, column + 4);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float turn = pair.at[j] * sines.at[j];
        own.at[j] = inside ? (own.at[j] * cosines.at[j] + (column + j < K / 2 ? -turn : turn)) * scale : 0;
    }
    return own;
}

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

/* This thread's part of the weights of the norms of queries and keys, long before they are needed. */
constexpr bool NORMS_AHEAD = 2 * K <= THREADS;
DEVICE float coming_norm(const Arguments &a, long long layer, int i = threadIdx.x) {
    if (!QK_NORM || i >= 2 * K || layer >= NUM_LAYERS) return 0;
    return i < K ? a.q_norm[layer * K + i] : a.k_norm[layer * K + i - K];
}

/* This block's parts of the context: match, weigh, gather. The newest key and value go into the cache, and count as
   the cache has them. `norm` is this layer's `coming_norm`, and then the next one's. */
DEVICE void attend(Ring &ring, const Arguments &a, const Parts &parts, int layer, float &norm, const float *qkv,
                   float *partials) {
    Shared &shared = ring.shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = lane % LANES * 8, group = lane / LANES;
    bool inside = column < K;
#pragma unroll 1
    for (int task = blockIdx.x; task < H * parts.splits; task += BLOCKS) {
        int head = task / parts.splits, split = task % parts.splits, shared_head = head / (H / G);
#pragma unroll 1
        for (int i = threadIdx.x; QK_NORM && i < 2 * K; i += THREADS) {
            shared.turning[2 * K + i] = NORMS_AHEAD ? norm : coming_norm(a, layer, i);
        }
        /* Few threads look for the head's query, and the newest key and value: what all ask for, all wait for. */
#pragma unroll 1
        for (int i = threadIdx.x * 4; i < 3 * K; i += THREADS * 4) {
            int head_of = i < K ? head : i < 2 * K ? H + shared_head : H + G + shared_head;
            *(float4 *)(shared.newest + i) = awaited((const float4 *)(qkv + head_of * K + i % K));
        }
        threads_meet<THREADS>(); /* the last task's sums have been read, too */
        /* Two warps (or one, after another) turn the query and the key. */
#pragma unroll 1
        for (int which = warp; which < 2; which += WARPS) {
            Eight own = turned(shared.newest + which * K, shared.turning, shared.turning + (2 + which) * K, column);
            if (group == 0 && inside) {
                float unit = which ? 1 : rsqrtf(K) * 1.44269504f; /* log2(e): the powers are of two */
#pragma unroll
                for (int j = 0; j < 8; j++) own.at[j] *= unit;
                if (which == 0) {
                    *(float4 *)(shared.query + column) = {own.at[0], own.at[1], own.at[2], own.at[3]};
                    *(float4 *)(shared.query + column + 4) = {own.at[4], own.at[5], own.at[6], own.at[7]};
                } else {
                    *(uint4 *)(shared.key + column / 2) = narrowed(own);
                    const float *value = shared.newest + 2 * K;
                    *(uint4 *)(shared.value + column / 2) = narrowed(eight_at(value, column, column + 4));
                }
            }
        }
        threads_meet<THREADS>();
        Eight q = {};
        if (inside) q = eight_at(shared.query, column, column + 4);
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
            uint4 key = {}, value = {};
            if (inside) key = *(const uint4 *)(shared.key + column / 2), value = *(const uint4 *)(shared.value + column / 2);
            float score = match(widened(key));
            if (group == 0) softmax.add(score, widened(value));
            if (group == 0 && inside && head % (H / G) == 0) {
                long long at = (((long long)layer * G + shared_head) * a.capacity + a.position) * K + column;
                *(uint4 *)(a.keys + at) = key;
                *(uint4 *)(a.values + at) = value;
            }
        }
#pragma unroll 1
        for (int distance = LANES; distance < 32; distance *= 2) softmax.join(distance);
        if (group == 0 && inside) {
#pragma unroll
            for (int j = 0; j < 8; j++) shared.mixed[warp][column + j] = softmax.mixed.at[j];
        }
        if (lane == 0) shared.largest[warp] = softmax.largest, shared.total[warp] = softmax.total;
        threads_meet<THREADS>();
        float largest = LOWEST;
#pragma unroll 4
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.largest[w]);
        for (int k = threadIdx.x; k < K + 2; k += THREADS) {
            float sum = 0;
#pragma unroll 4
            for (int w = 0; w < WARPS; w++) {
                sum += exp2f(shared.largest[w] - largest) * (k < K ? shared.mixed[w][k] : shared.total[w]);
            }
            publish(partials + task * PARTIAL + k, k == K ? largest : sum);
        }
    }
    norm = coming_norm(a, layer + 1);
}

/* What all heads gathered, from the parts of each. */
DEVICE void receive_mixed(Shared &shared, const float *partials, int splits) {
    constexpr int at_once = 4;
#pragma unroll 1
    for (int i = threadIdx.x * 2; i < H * K; i += THREADS * 2) {
        const float *from = partials + i / K * splits * PARTIAL;
        float largest = LOWEST, total = 0;
        float2 mixed = {0, 0};
#pragma unroll 1
        for (int first = 0; first < splits; first += at_once) {
            float2 sums[at_once], ends[at_once];
            unsigned looks = 0;
            for (bool all = false; !all;) {
                all = true;
#pragma unroll
                for (int j = 0; j < at_once; j++) {
                    const float *part = from + (first + j < splits ? first + j : first) * PARTIAL;
                    sums[j] = load_published((const float2 *)(part + i % K));
                    ends[j] = load_published((const float2 *)(part + K));
                }
#pragma unroll
                for (int j = 0; j < at_once; j++) all = all && !missing(sums[j]) && !missing(ends[j]);
                if (!all) look_again(looks);
            }
#pragma unroll
            for (int j = 0; j < at_once; j++) {
                float end = first + j < splits ? ends[j].x : LOWEST, now = fmaxf(largest, end);
                float before = exp2f(largest - now), share = first + j < splits ? exp2f(end - now) : 0;
                largest = now;
                total = total * before + ends[j].y * share;
                mixed.x = mixed.x * before + sums[j].x * share, mixed.y = mixed.y * before + sums[j].y * share;
            }
        }
        keep(shared, i, __fdividef(mixed.x, total), __fdividef(mixed.y, total));
    }
    keep_nothing_behind<H * K>(shared);
}
