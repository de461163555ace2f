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
    alignas(16) float newest[3 * K]; /* a head's query, key and value */
    alignas(16) float turning[4 * K]; /* cosines and sines of the position, the weights of the layer's two norms */
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

/* The products of a step, four a layer and the vocabulary's. All go through the same few instructions: a layer's code,
   written out for each, did not fit into the instruction cache, and a multiprocessor waited nine clocks for each. */
enum Kind { TO_QKV, TO_MIDDLE, TO_FEED, TO_OUT, TO_SCORES };

struct Product {
    int layer, kind;
    DEVICE Product(int number)
        : layer(number / 4), kind(number < 4 * NUM_LAYERS ? number % 4 : TO_SCORES) {}
    DEVICE int width() const { return kind == TO_OUT ? F : kind == TO_MIDDLE ? H * K : D; }
    DEVICE int together() const { return kind == TO_FEED ? 2 : 1; } /* rows whose results belong together */
    DEVICE int groups() const { return kind == TO_QKV ? QKV : kind == TO_FEED ? F : kind == TO_SCORES ? VOCABULARY : D; }
    DEVICE int groups_per_slot() const { return SLOT_BYTES / (2 * width() * together()); }
    DEVICE const bf16 *weights(const Arguments &a) const {
        const bf16 *all = kind == TO_QKV ? a.qkv : kind == TO_MIDDLE ? a.o : kind == TO_FEED ? a.gate_up
                        : kind == TO_OUT ? a.down : a.vocabulary;
        return all + (kind == TO_SCORES ? 0 : (long long)layer * groups() * together() * width());
    }
};

#define PRODUCTS (4 * NUM_LAYERS + 1)

DEVICE void copy_rows(Ring &ring, const Arguments &a, const Product &product) {
    Share share(product.groups());
    int bytes = product.together() * product.width() * 2;
    const char *weights = (const char *)product.weights(a);
    for (int group = share.first; group < share.last; group += product.groups_per_slot()) {
        char *slot = ring.when_empty();
        int count = share.last - group < product.groups_per_slot() ? share.last - group : product.groups_per_slot();
        Barrier *full = &ring.shared.full[ring.slot];
        barrier_arrive_expecting(full, count * bytes);
        copy_to_shared(slot, weights + (long long)group * bytes, count * bytes, full);
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
#pragma unroll 1
    for (int number = 0; number < PRODUCTS; number++) {
        Product product(number);
        if (product.kind == TO_MIDDLE) copy_cache(ring, a, parts, product.layer);
        copy_rows(ring, a, product);
    }
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

DEVICE void receive(float *x, const float *from, int width) {
#pragma unroll 1
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
    /* A lane's part of the sum of squares. */
    DEVICE float squares() const {
        float sums[4] = {};
#pragma unroll kept ? parts : 1
        for (int part = 0; part < parts; part++) {
            Eight own = get(part);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j % 4] += own.at[j] * own.at[j];
        }
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
};

/* Call use(group, y) in one lane for each group of this block's rows, with y = weights x; if `normed`, of x / rms(x). */
template <int width, int together, typename Use>
DEVICE void multiply(Ring &ring, const float *vector, const Product &product, bool normed, const Use &use) {
    Columns<width> x(vector);
    Share share(product.groups());
    int per_slot = product.groups_per_slot(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = warp;
    float squares = x.squares(), scale = 0; /* not known yet: the lanes' squares are summed together with the first row */
#pragma unroll 1
    for (int begin = 0; begin < share.count(); begin += per_slot) {
        const uint4 *slot = (const uint4 *)ring.when_full();
        int end = share.count() < begin + per_slot ? share.count() : begin + per_slot;
#pragma unroll 1
        for (; mine < end; mine += WARPS) {
            float sums[together][4] = {};
#pragma unroll Columns<width>::kept ? Columns<width>::parts : 2
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
            for (int n = 0; n < together; n++) y[n] = (sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]);
            if (scale == 0) { /* the same in all lanes */
#pragma unroll
                for (int offset = 16; offset; offset /= 2) {
                    squares += __shfl_xor_sync(~0u, squares, offset);
#pragma unroll
                    for (int n = 0; n < together; n++) y[n] += __shfl_xor_sync(~0u, y[n], offset);
                }
                scale = normed ? rsqrtf(squares * (1.0f / width) + NORM_EPS) : 1;
            } else {
#pragma unroll
                for (int n = 0; n < together; n++) y[n] = lanes_sum(y[n]);
            }
#pragma unroll
            for (int n = 0; n < together; n++) y[n] *= scale;
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
    for (int i = threadIdx.x; i < 2 * K; i += THREADS) {
        shared.turning[i] = a.rotary[(a.position + i / K * (long long)NUM_POSITIONS) * K + i % K];
    }
    threads_meet<THREADS>();
    for (long long i = (blockIdx.x * THREADS + threadIdx.x) * 4; i < EXCHANGE; i += BLOCKS * THREADS * 4) {
        *(uint4 *)(other_set + i) = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    Best best;
#pragma unroll 1
    for (int number = 0; number < PRODUCTS; number++) {
        Product product(number);
        float *at = set + (long long)product.layer * LAYER;
        bool normed = product.kind != TO_MIDDLE && product.kind != TO_OUT;
        float *vector = normed ? shared.hidden : shared.inner;
        if (product.kind == TO_MIDDLE) {
            attend(ring, a, parts, product.layer, at + AT_QKV, at + AT_PARTIALS);
            STAMP();
            receive_mixed(vector, at + AT_PARTIALS, parts.splits);
        } else if (number > 0) {
            int before = product.kind == TO_FEED ? AT_MIDDLE : product.kind == TO_OUT ? AT_FEED : AT_OUT - LAYER;
            receive(vector, at + before, product.width());
        }
        STAMP();
        auto use = [&](int row, const float *y) {
            if (product.kind == TO_SCORES) {
                a.logits[row] = y[0];
                best.add(y[0], row);
            } else if (product.kind == TO_QKV) {
                publish(at + AT_QKV + row, y[0]);
            } else {
                publish(at + (product.kind == TO_MIDDLE ? AT_MIDDLE : AT_OUT) + row, shared.residual[row - own.first] += y[0]);
            }
        };
        if (product.kind == TO_FEED) {
            multiply<D, 2>(ring, vector, product, true, [&](int row, const float *y) {
                publish(at + AT_FEED + row, __fdividef(y[0], 1 + __expf(-y[0])) * y[1]);
            });
        } else if (F != D && product.kind == TO_OUT) {
            multiply<F, 1>(ring, vector, product, false, use);
        } else if (H * K != D && product.kind == TO_MIDDLE) {
            multiply<H * K, 1>(ring, vector, product, false, use);
        } else {
            multiply<D, 1>(ring, vector, product, normed, use);
        }
        STAMP();
    }
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
