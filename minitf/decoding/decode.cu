/* One step of decoding on a GPU in one kernel: the next token's scores of one text, from the key/value cache.

   At batch 1 a step is bound by reading the weights, and a kernel for each product would spend its time on starting.
   Here one block of threads stays on every multiprocessor for the whole step.

   Weights do not depend on what is computed. One thread of each block copies the rows the block will need, in the order
   of use, into a ring of slots in shared memory, always as far ahead as there is room; the keys and values of the cache
   go the same way.

   Vectors go from block to block through memory without barriers. Where a value will be, there is first a pattern that
   no value has (all bits set); whoever needs it looks until it is there. Every value of a step has a place of its own;
   steps take turns with two sets of places, and each step clears the set of the other.

   The norms' weights are part of the matrices that follow them. Axes as everywhere: D hidden, H heads, G key/value
   heads, K head width, F feed-forward, V vocabulary; they and the sizes of the launch are compiled in. */

#include <device.cuh>

#define THREADS (WARPS * 32) /* that compute; one more warp copies */
#define QKV ((H + 2 * G) * K)
#define MOST_SPLITS (BLOCKS / H > 1 ? BLOCKS / H : 1) /* parts of the context that different blocks attend to */
#define PARTIAL (K + 4)                               /* of one part: sums of values, largest score, sum of weights */
#define POSITIONS_PER_SLOT (SLOT_BYTES / (4 * K))
#define LOWEST -1e30f /* below every score, and a number: less itself it is 0 */

struct Arguments {
    const bf16 *qkv, *o, *gate_up, *down, *vocabulary; /* (layers, rows, columns); gate and up in turn, row by row */
    const void *embedding;                             /* (V, D) of the parameters' own type */
    const float *q_norm, *k_norm;                      /* (layers, K) */
    const float *rotary;                               /* (2, NUM_POSITIONS, K) */
    bf16 *keys, *values;                               /* (layers, 1, G, capacity, K) */
    float *exchange;                                   /* two sets of EXCHANGE floats */
    const long long *starts, *ids;                     /* where the text begins in the cache, or null; the token to read */
    float *logits;
    long long *likeliest, *told; /* the id with the largest score; to the host: that, and whether all scores are finite */
    long long *stamps;           /* only written if compiled with STAMPS: clocks of each block */
    long long capacity, position, set;
};

/* The places of a layer's values in a set, in floats; after all layers, each block's best score. */
#define AT_QKV 0
#define AT_PARTIALS (AT_QKV + QKV)
#define AT_MIDDLE (AT_PARTIALS + H * MOST_SPLITS * PARTIAL)
#define AT_FEED (AT_MIDDLE + D)
#define AT_OUT (AT_FEED + F)
#define LAYER (AT_OUT + D)
#define EXCHANGE (NUM_LAYERS * LAYER + (BLOCKS + 1) / 2 * 4)

#define PADDED(width) (((width) + 255) / 256 * 256)
#define MOST_RESIDUALS ((D + BLOCKS - 1) / BLOCKS)

struct Shared {
    alignas(128) char slots[NUM_SLOTS][SLOT_BYTES];
    alignas(16) float hidden[PADDED(D)];
    alignas(16) float inner[PADDED(H * K > F ? H * K : F)];
    alignas(16) float mixed[WARPS][K];
    float largest[WARPS], total[WARPS];
    float residual[MOST_RESIDUALS]; /* the rows of the residual stream that this block adds to */
    unsigned long long best[WARPS];
    Barrier full[NUM_SLOTS], empty[NUM_SLOTS];
};

/* This block's share of some rows: [first, last). */
struct Share {
    int first, last;
    DEVICE Share(int rows) : first((long long)rows * blockIdx.x / BLOCKS), last((long long)rows * (blockIdx.x + 1) / BLOCKS) {}
    DEVICE int count() const { return last - first; }
};

/* How the cache is shared out: each head's positions in parts of whole slots, part by part to the blocks in turn. The
   newest position comes on top of the last part. */
struct Parts {
    int start, cached, slots, splits;
    DEVICE Parts(const Arguments &a) {
        start = a.starts ? (int)a.starts[0] : 0;
        cached = (int)a.position - start;
        slots = (cached + POSITIONS_PER_SLOT - 1) / POSITIONS_PER_SLOT;
        splits = slots < 1 ? 1 : slots > MOST_SPLITS ? MOST_SPLITS : slots;
    }
    DEVICE int begin(int split) const { return slots * split / splits; }
    DEVICE int positions(int slot) const {
        int left = cached - slot * POSITIONS_PER_SLOT;
        return left < POSITIONS_PER_SLOT ? left : POSITIONS_PER_SLOT;
    }
};

/* The slots in shared memory, in turn. The thread that copies and those that compute walk through them alike. */
struct Ring {
    Shared &shared;
    int slot = 0;
    unsigned odd = 0;
    DEVICE Ring(Shared &shared) : shared(shared) {}
    DEVICE void next() {
        if (++slot == NUM_SLOTS) slot = 0, odd ^= 1;
    }
    DEVICE char *when_full() {
        barrier_wait(&shared.full[slot], odd);
        return shared.slots[slot];
    }
    DEVICE void done() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[slot]);
        next();
    }
    DEVICE char *when_empty() {
        barrier_wait(&shared.empty[slot], odd ^ 1);
        return shared.slots[slot];
    }
};

/* Rows of `width` columns that fit into a slot, in groups of `together`. */
template <int width, int together> DEVICE constexpr int rows_per_slot() {
    return SLOT_BYTES / (2 * width * together) * together;
}

template <int width, int together> DEVICE void copy_rows(Ring &ring, const bf16 *weights, int rows) {
    Share share(rows / together);
    int first = share.first * together, last = share.last * together;
    for (int row = first; row < last; row += rows_per_slot<width, together>()) {
        char *slot = ring.when_empty();
        int count = last - row < rows_per_slot<width, together>() ? last - row : rows_per_slot<width, together>();
        Barrier *full = &ring.shared.full[ring.slot];
        barrier_arrive_expecting(full, count * width * 2);
        copy_to_shared(slot, weights + (long long)row * width, count * width * 2, full);
        ring.next();
    }
}

DEVICE void copy_cache(Ring &ring, const Arguments &a, const Parts &parts, int layer) {
    for (int task = blockIdx.x; task < H * parts.splits; task += BLOCKS) {
        int head = task / parts.splits, split = task % parts.splits;
        long long row = ((long long)layer * G + head / (H / G)) * a.capacity + parts.start;
        for (int part = parts.begin(split); part < parts.begin(split + 1); part++) {
            char *slot = ring.when_empty();
            long long at = (row + part * POSITIONS_PER_SLOT) * K;
            unsigned bytes = parts.positions(part) * K * 2;
            Barrier *full = &ring.shared.full[ring.slot];
            barrier_arrive_expecting(full, 2 * bytes);
            copy_to_shared(slot, a.keys + at, bytes, full);
            copy_to_shared(slot + SLOT_BYTES / 2, a.values + at, bytes, full);
            ring.next();
        }
    }
}

/* All that this block reads in a step, in the order of use. */
DEVICE void copy_all(Ring ring, const Arguments &a) {
    Parts parts(a);
    for (long long layer = 0; layer < NUM_LAYERS; layer++) {
        copy_rows<D, 1>(ring, a.qkv + layer * QKV * D, QKV);
        copy_cache(ring, a, parts, layer);
        copy_rows<H * K, 1>(ring, a.o + layer * D * H * K, D);
        copy_rows<D, 2>(ring, a.gate_up + layer * 2 * F * D, 2 * F);
        copy_rows<F, 1>(ring, a.down + layer * D * F, D);
    }
    copy_rows<D, 1>(ring, a.vocabulary, VOCABULARY);
}

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

DEVICE void publish(float *at, float x) {
    store_published(at, missing(x) ? __uint_as_float(0x7fc00000) : x); /* of what is no number, another pattern */
}

/* Where four values of a vector lie in shared memory: a lane takes 8 columns as two groups of 4, which are kept in
   separate halves of 128, so that the lanes' reads spread over all banks. */
DEVICE int place(int i) { return i / 256 * 256 + i / 4 % 2 * 128 + i % 256 / 8 * 4; }

template <int width> DEVICE void receive(float *x, const float *from) {
    for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) {
        *(float4 *)(x + place(i)) = awaited((const float4 *)(from + i));
    }
    threads_meet<THREADS>();
}

struct Eight {
    float at[8];
};

DEVICE Eight widened(uint4 x) {
    return {__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000), __uint_as_float(x.y << 16),
            __uint_as_float(x.y & 0xffff0000), __uint_as_float(x.z << 16), __uint_as_float(x.z & 0xffff0000),
            __uint_as_float(x.w << 16), __uint_as_float(x.w & 0xffff0000)};
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

/* A lane's columns of a vector in shared memory; of a narrow one, in registers for all rows to come. */
template <int width> struct Columns {
    static constexpr int parts = PADDED(width) / 256;
    static constexpr bool kept = parts <= 4;
    const float *x;
    int lane;
    Eight registers[kept ? parts : 1];
    DEVICE Columns(const float *x) : x(x), lane(threadIdx.x % 32) {
        if constexpr (kept)
#pragma unroll
            for (int part = 0; part < parts; part++) registers[part] = load(part);
    }
    DEVICE bool inside(int part) const { return width % 256 == 0 || part * 256 + lane * 8 < width; }
    DEVICE Eight load(int part) const {
        if (!inside(part)) return {};
        const float *at = x + part * 256 + lane * 4;
        return both(*(const float4 *)at, *(const float4 *)(at + 128));
    }
    DEVICE Eight get(int part) const {
        if constexpr (kept) return registers[part];
        else return load(part);
    }
    /* 1 / rms(x) */
    DEVICE float scale() const {
        float squares[4] = {};
#pragma unroll
        for (int part = 0; part < parts; part++) {
            Eight own = get(part);
#pragma unroll
            for (int j = 0; j < 8; j++) squares[j % 4] += own.at[j] * own.at[j];
        }
        return rsqrtf(lanes_sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / width + NORM_EPS);
    }
};

/* Call use(row, y) in one lane for each of this block's rows, row of `rows`, or group of rows, with y = weights x. */
template <int width, int together, typename Use>
DEVICE void multiply(Ring &ring, const Columns<width> &x, int rows, const Use &use) {
    constexpr int per_slot = rows_per_slot<width, together>() / together;
    Share share(rows / together);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = warp;
    for (int begin = 0; begin < share.count(); begin += per_slot) {
        const uint4 *slot = (const uint4 *)ring.when_full();
        int end = share.count() < begin + per_slot ? share.count() : begin + per_slot;
        for (; mine < end; mine += WARPS) {
            float sums[together][4] = {};
#pragma unroll
            for (int part = 0; part < Columns<width>::parts; part++) {
                if (!x.inside(part)) continue;
                Eight own = x.get(part);
#pragma unroll
                for (int n = 0; n < together; n++) {
                    Eight w = widened(slot[((mine - begin) * together + n) * (width / 8) + part * 32 + lane]);
#pragma unroll
                    for (int j = 0; j < 8; j++) sums[n][j % 4] += w.at[j] * own.at[j];
                }
            }
            float y[together];
#pragma unroll
            for (int n = 0; n < together; n++) {
                y[n] = lanes_sum((sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]));
            }
            if (lane == 0) use(share.first + mine, y);
        }
        ring.done();
    }
}

#include <attention.cuh>

/* A float's bits in the order of their values. */
DEVICE unsigned ordered(float x) {
    unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}

/* The largest score and its token as one number, of equal ones the first; all bits of the upper half: not finite. */
struct Best {
    unsigned long long key = 0;
    DEVICE void add(unsigned long long other) { key = other > key ? other : key; }
    DEVICE void add(float score, int token) {
        bool finite = (__float_as_uint(score) & 0x7f800000) != 0x7f800000;
        add(((unsigned long long)(finite ? ordered(score) : ~0u) << 32) | (0x7fffffff - token));
    }
    DEVICE bool finite() const { return key >> 32 != ~0u; }
    DEVICE long long token() const { return 0x7fffffff - (long long)(key & 0x7fffffff); }
};

/* The first block hears from all which token is the likeliest, and tells the next step and the host. */
DEVICE void choose(Shared &shared, const Arguments &a, unsigned long long *keys, Best best) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) shared.best[warp] = best.key;
    threads_meet<THREADS>();
    if (warp > 0) return;
    if (lane == 0) {
        for (int other = 1; other < WARPS; other++) best.add(shared.best[other]);
        store_published(keys + blockIdx.x, best.key);
    }
    if (blockIdx.x > 0) return;
    for (int block = lane; block < BLOCKS; block += 32) best.add(awaited(keys + block));
#pragma unroll
    for (int offset = 16; offset; offset /= 2) best.add(__shfl_xor_sync(~0u, best.key, offset));
    if (lane == 0) {
        *a.likeliest = a.told[0] = best.token();
        a.told[1] = best.finite();
    }
}

#ifdef STAMPS
#define STAMP() if (threadIdx.x == 0) a.stamps[blockIdx.x * STAMPS + stamp++] = clock64()
#else
#define STAMP()
#endif

DEVICE void compute(Shared &shared, const Arguments &a) {
    Ring ring(shared);
    Parts parts(a);
    Turn turned(a.rotary, a.position);
    [[maybe_unused]] int stamp = 0;
    STAMP();
    float *set = a.exchange + a.set * EXCHANGE, *other_set = a.exchange + (1 - a.set) * EXCHANGE;
    Share own(D);
    long long token = a.ids[0];
    for (int i = threadIdx.x; i < D; i += THREADS) {
        float x = embedded(a.embedding, token * D + i);
        shared.hidden[place(i) + i % 4] = x;
        if (own.first <= i && i < own.last) shared.residual[i - own.first] = x;
    }
    threads_meet<THREADS>();
    for (long long i = (blockIdx.x * THREADS + threadIdx.x) * 4; i < EXCHANGE; i += BLOCKS * THREADS * 4) {
        *(uint4 *)(other_set + i) = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        float *at = set + (long long)layer * LAYER;
        if (layer > 0) receive<D>(shared.hidden, at - LAYER + AT_OUT);
        STAMP();
        {
            Columns<D> x(shared.hidden);
            float scale = x.scale();
            multiply<D, 1>(ring, x, QKV, [&](int row, const float *y) { publish(at + AT_QKV + row, y[0] * scale); });
        }
        STAMP();
        attend(ring, a, parts, turned, layer, at + AT_QKV, at + AT_PARTIALS);
        STAMP();
        receive_mixed(shared.inner, at + AT_PARTIALS, parts.splits);
        STAMP();
        auto add = [&](float *to) {
            return [&shared, &own, to](int row, const float *y) {
                publish(to + row, shared.residual[row - own.first] += y[0]);
            };
        };
        multiply<H * K, 1>(ring, Columns<H * K>(shared.inner), D, add(at + AT_MIDDLE));
        STAMP();
        receive<D>(shared.hidden, at + AT_MIDDLE);
        STAMP();
        {
            Columns<D> x(shared.hidden);
            float scale = x.scale();
            multiply<D, 2>(ring, x, 2 * F, [&](int row, const float *y) {
                float gate = y[0] * scale;
                publish(at + AT_FEED + row, gate / (1 + __expf(-gate)) * (y[1] * scale));
            });
        }
        STAMP();
        receive<F>(shared.inner, at + AT_FEED);
        STAMP();
        multiply<F, 1>(ring, Columns<F>(shared.inner), D, add(at + AT_OUT));
        STAMP();
    }
    receive<D>(shared.hidden, set + (long long)(NUM_LAYERS - 1) * LAYER + AT_OUT);
    STAMP();
    Columns<D> x(shared.hidden);
    float scale = x.scale();
    Best best;
    multiply<D, 1>(ring, x, VOCABULARY, [&](int row, const float *y) {
        a.logits[row] = y[0] * scale;
        best.add(y[0] * scale, row);
    });
    STAMP();
    choose(shared, a, (unsigned long long *)(set + (long long)NUM_LAYERS * LAYER), best);
    STAMP();
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode(const __grid_constant__ Arguments a) {
    Shared &shared = *(Shared *)shared_memory();
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < NUM_SLOTS; slot++) {
            barrier_init(&shared.full[slot], 1);
            barrier_init(&shared.empty[slot], WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (threadIdx.x < THREADS) compute(shared, a);
    else if (threadIdx.x == THREADS) copy_all(Ring(shared), a);
}
