/* One step of decoding on a GPU in one kernel: the next token's scores of one text, from the key/value cache.

   At batch 1 a step is bound by reading the weights, and a kernel for each product would spend its time on starting.
   Here one block of threads stays on every multiprocessor for the whole step.

   Weights do not depend on what is computed. One thread of each block copies the rows the block will need, in the order
   of use, into a ring of slots in shared memory, always as far ahead as there is room; the keys and values of the cache
   go the same way.

   Vectors go from block to block through memory without barriers. Where a value will be, there is first a pattern that
   no value has (all bits set); whoever needs it looks until it is there. Every value of a step has a place of its own;
   steps take turns with two sets of places, and each step clears the set of the other. A set is there several times: a
   line of memory that all multiprocessors ask for at once keeps each of them waiting for 2 us.

   The products are the tensor cores': of 8 rows at a time with a vector in two parts, rounded to bf16 and what that left
   out, which takes no longer. What counts most is how few instructions lie between the arrival of a vector and the next
   one's departure: a warp takes four clocks and more for each. So sizes are constants, and weights wait in registers.

   The norms' weights are part of the matrices that follow them. Axes as everywhere: D hidden, H heads, G key/value
   heads, K head width, F feed-forward, V vocabulary; they and the sizes of the launch are compiled in. */

#include <device.cuh>

#define THREADS (WARPS * 32) /* that compute; one more warp copies */
#define QKV ((H + 2 * G) * K)
#define PARTIAL (K + 4)                               /* of one part: sums of values, largest score, sum of weights */
#define POSITIONS_PER_SLOT (SLOT_BYTES / (4 * K))
#define SLOTS_PER_SPLIT 2 /* at least, of a part of the context: every part of a head is one more to put together */
#define TILES 4           /* of 8 rows that a warp multiplies at once */
#define LOWEST -1e30f /* below every score, and a number: less itself it is 0 */

struct Arguments {
    /* (layers, rows, padded columns); gate and up in turn, row by row; odd rows with the halves of each 64 swapped */
    const bf16 *qkv, *o, *gate_up, *down, *vocabulary;
    const void *embedding;                             /* (V, D) of the parameters' own type */
    const float *q_norm, *k_norm;                      /* (layers, K) */
    const float *rotary;                               /* (2, NUM_POSITIONS, K) */
    bf16 *keys, *values;                               /* (layers, 1, G, capacity, K) */
    float *exchange;                                   /* two sets */
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
#define SET ((long long)REPLICAS * EXCHANGE)

#define PADDED(width) (((width) + 63) / 64 * 64) /* columns of a row of weights in memory */
#define WIDEST (D > F ? D > H * K ? D : H * K : F > H * K ? F : H * K)
#define MOST_RESIDUALS ((D + BLOCKS - 1) / BLOCKS)

struct Shared {
    alignas(128) char slots[NUM_SLOTS][SLOT_BYTES];
    alignas(16) unsigned high[PADDED(WIDEST) / 2], low[PADDED(WIDEST) / 2]; /* a vector, in pairs of bf16 */
    alignas(16) float newest[3 * K];  /* a head's query, key and value */
    alignas(16) float turning[4 * K]; /* cosines and sines of the position, the weights of the layer's two norms */
    alignas(16) float query[K];
    alignas(16) unsigned key[K / 2], value[K / 2];
    alignas(16) float mixed[WARPS][K];
    alignas(16) float partials[2][WARPS][8 * TILES]; /* of products, from each warp's columns */
    float squares[2][WARPS];                         /* of the vector, by each warp's part */
    float largest[WARPS], total[WARPS];
    float residual[MOST_RESIDUALS]; /* the rows of the residual stream that this block adds to */
    unsigned long long best[WARPS];
    Barrier full[NUM_SLOTS], empty[NUM_SLOTS];
};

/* This block's share of some rows: [first, last). */
struct Share {
    int first, last;
    DEVICE Share(unsigned rows) : first(rows * blockIdx.x / BLOCKS), last(rows * (blockIdx.x + 1) / BLOCKS) {}
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
        int wanted = (slots + SLOTS_PER_SPLIT - 1) / SLOTS_PER_SPLIT;
        splits = wanted < 1 ? 1 : wanted > MOST_SPLITS ? MOST_SPLITS : wanted;
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

/* The products of a step: four a layer, and the vocabulary's. */
enum Kind { TO_QKV, TO_MIDDLE, TO_FEED, TO_OUT, TO_SCORES };

template <int kind> struct Product {
    static constexpr int width = kind == TO_OUT ? F : kind == TO_MIDDLE ? H * K : D;
    static constexpr int together = kind == TO_FEED ? 2 : 1; /* rows whose results belong together */
    static constexpr int groups = kind == TO_QKV ? QKV : kind == TO_FEED ? F : kind == TO_SCORES ? VOCABULARY : D;
    static constexpr bool normed = kind != TO_MIDDLE && kind != TO_OUT;
    static constexpr int bytes = 2 * PADDED(width); /* of a row */
    static constexpr int fitting = SLOT_BYTES / bytes;
    /* Rows in a slot: whole tiles, or less than one. */
    static constexpr int per_slot = fitting >= 32 ? 32 : fitting >= 16 ? 16 : fitting >= 8 ? 8 : fitting / together * together;
    static constexpr int tile = per_slot < 8 ? per_slot : 8, tiles_per_slot = per_slot / tile;
    /* What a warp multiplies at once: tiles of the same rows as the others, and every so many 32 columns. */
    static constexpr int most_rows = (groups + BLOCKS - 1) / BLOCKS * together;
    static constexpr int most_slots = (most_rows + per_slot - 1) / per_slot;
    static constexpr int wanted_slots = TILES / tiles_per_slot < most_slots ? TILES / tiles_per_slot : most_slots;
    static constexpr int slots = wanted_slots < NUM_SLOTS ? wanted_slots : NUM_SLOTS, tiles = slots * tiles_per_slot;
    static constexpr int steps = (bytes / 64 + WARPS - 1) / WARPS;
    static constexpr bool whole = bytes / 64 % WARPS == 0; /* whether there is work for all warps in all steps */
    static constexpr bool ahead = tiles * steps <= 20;     /* whether the weights fit into registers */
    static_assert(WARPS % 2 == 0, "the halves of 64 columns are those of two neighbouring warps");
};

template <int kind> DEVICE void copy_rows(Ring &ring, const bf16 *weights, int layer) {
    using P = Product<kind>;
    Share share(P::groups);
    int row = share.first * P::together, last = share.last * P::together;
    const char *from = (const char *)weights + ((long long)layer * P::groups * P::together + row) * P::bytes;
#pragma unroll 1
    for (; row < last; row += P::per_slot, from += P::per_slot * P::bytes) {
        char *slot = ring.when_empty();
        int count = last - row < P::per_slot ? last - row : P::per_slot;
        Barrier *full = &ring.shared.full[ring.slot];
        barrier_arrive_expecting(full, count * P::bytes);
        copy_to_shared(slot, from, count * P::bytes, full);
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
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        copy_rows<TO_QKV>(ring, a.qkv, layer);
        copy_cache(ring, a, parts, layer);
        copy_rows<TO_MIDDLE>(ring, a.o, layer);
        copy_rows<TO_FEED>(ring, a.gate_up, layer);
        copy_rows<TO_OUT>(ring, a.down, layer);
    }
    copy_rows<TO_SCORES>(ring, a.vocabulary, 0);
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

/* Call use(group, y, z) in one thread for each group of this block's rows, with its one or two products with a vector or,
   if normed, with the vector / its rms. `vector` has it kept, and returns this thread's part of the sum of squares.
   `batches` counts on from call to call. */
template <int kind, typename Vector, typename Use>
DEVICE void multiply(Ring &ring, int &batches, const Vector &vector, const Use &use) {
    using P = Product<kind>;
    Shared &shared = ring.shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Share share(P::groups);
    int first = share.first * P::together, count = share.count() * P::together;
    float squares = 0;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += P::slots * P::per_slot, batches++) {
        int rows = count - begin < P::slots * P::per_slot ? count - begin : P::slots * P::per_slot;
        /* A lane gives 16 bytes of each 64 of a row, and 4 lanes all of them; which row, its group of 4 says. Rows that
           are not there give sums that nobody asks for. */
        auto weights_of = [&](const char *slot, int tile, int step) {
            int row = P::tile < 8 && lane / 4 >= P::tile ? P::tile - 1 : lane / 4;
            int swapped = (first + begin + (P::tile % 2 ? tile : 0) + row) % 2;
            const char *at = slot + (tile % P::tiles_per_slot * 8 + row) * P::bytes + (warp ^ swapped) * 64 + lane % 4 * 16;
            return *(const uint4 *)(at + step * WARPS * 64);
        };
        uint4 weights[P::ahead ? P::tiles : 1][P::ahead ? P::steps : 1] = {};
        Ring here = ring;
#pragma unroll
        for (int slot = 0; slot < P::slots; slot++) {
            if (slot * P::per_slot >= rows) break;
            [[maybe_unused]] const char *from = ring.when_full();
            if constexpr (P::ahead) {
#pragma unroll
                for (int i = 0; i < P::tiles_per_slot * P::steps; i++) {
                    int tile = slot * P::tiles_per_slot + i / P::steps, step = i % P::steps;
                    if (P::whole || step * WARPS + warp < P::bytes / 64) weights[tile][step] = weights_of(from, tile, step);
                }
                ring.done();
            } else {
                ring.next();
            }
        }
        if (begin == 0) {
            squares = vector();
            threads_meet<THREADS>();
        }
        float sums[P::tiles][4] = {};
#pragma unroll P::ahead ? P::steps : 1
        for (int step = 0; step < P::steps; step++) {
            if (!P::whole && step * WARPS + warp >= P::bytes / 64) break;
            int column = (step * WARPS + warp) * 64 + lane % 4 * 16;
            uint4 high = *(const uint4 *)((const char *)shared.high + column);
            uint4 low = *(const uint4 *)((const char *)shared.low + column);
            [[maybe_unused]] Ring at = here;
#pragma unroll
            for (int tile = 0; tile < P::tiles; tile++) {
                uint4 w;
                if constexpr (P::ahead) {
                    w = weights[tile][step];
                } else {
                    w = weights_of(shared.slots[at.slot], tile, step);
                    if (tile % P::tiles_per_slot == P::tiles_per_slot - 1) at.next();
                }
                multiply_tile(sums[tile], high.x, low.x, high.y, low.y, w.x, w.y);
                multiply_tile(sums[tile], high.z, low.z, high.w, low.w, w.z, w.w);
            }
        }
        if constexpr (!P::ahead) {
#pragma unroll 1
            for (int slot = 0; slot * P::per_slot < rows && slot < P::slots; slot++) here.done();
        }
        if (P::normed && begin == 0) {
            squares = lanes_sum(squares);
            if (lane == 0) shared.squares[kind == TO_FEED][warp] = squares;
        }
        if (lane < 4) {
#pragma unroll
            for (int tile = 0; tile < P::tiles; tile++) {
                float2 sum = {sums[tile][0] + sums[tile][2], sums[tile][1] + sums[tile][3]};
                *(float2 *)(shared.partials[batches % 2][warp] + tile * 8 + lane * 2) = sum;
            }
        }
        threads_meet<THREADS>();
        /* One warp puts the parts together while the others go on: the last in a layer, which has no part in receiving a
           short vector, and one after the other for the vocabulary. */
        if (warp != (kind == TO_SCORES ? batches % WARPS : WARPS - 1)) continue;
        int row = lane * P::together;
        if (row >= rows) continue;
        int place = row / P::tile * 8 + row % P::tile;
        float y[2] = {}, z[2] = {}, square[2] = {};
#pragma unroll
        for (int other = 0; other < WARPS; other++) {
            y[other % 2] += shared.partials[batches % 2][other][place];
            if (P::together == 2) z[other % 2] += shared.partials[batches % 2][other][place + 1];
            if (P::normed) square[other % 2] += shared.squares[kind == TO_FEED][other];
        }
        float scale = P::normed ? rsqrtf((square[0] + square[1]) * (1.0f / D) + NORM_EPS) : 1;
        use(share.first + begin / P::together + lane, (y[0] + y[1]) * scale, (z[0] + z[1]) * scale);
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
#pragma unroll
    for (int offset = 16; offset; offset /= 2) best.add(__shfl_xor_sync(~0u, best.key, offset));
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

/* The pattern for what is not there yet into some places of all replicas of a set. */
DEVICE void clear(float *set, int floats) {
#pragma unroll 1
    for (int replica = 0; replica < REPLICAS; replica++) {
#pragma unroll 1
        for (int i = (blockIdx.x * THREADS + threadIdx.x) * 4; i < floats; i += BLOCKS * THREADS * 4) {
            *(uint4 *)(set + (long long)replica * EXCHANGE + i) = make_uint4(~0u, ~0u, ~0u, ~0u);
        }
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
    float *set = a.exchange + a.set * SET, *other_set = a.exchange + (1 - a.set) * SET;
    long long replica = (long long)(blockIdx.x % REPLICAS) * EXCHANGE; /* the one this block reads */
    Share own(D);
    long long token = a.ids[0];
    float sum = 0, norm = coming_norm(a, 0);
    for (int i = threadIdx.x * 4; i < D; i += THREADS * 4) {
        float x[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            x[j] = embedded(a.embedding, token * D + i + j);
            if (own.first <= i + j && i + j < own.last) shared.residual[i + j - own.first] = x[j];
        }
        sum += keep(shared, i, {x[0], x[1], x[2], x[3]});
    }
    keep_nothing_behind<D>(shared);
    for (int i = threadIdx.x; i < 2 * K; i += THREADS) {
        shared.turning[i] = a.rotary[(a.position + i / K * (long long)NUM_POSITIONS) * K + i % K];
    }
    threads_meet<THREADS>();
    Best best;
    int batches = 0;
#pragma unroll 1
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        float *to = set + (long long)layer * LAYER, *from = to + replica;
        auto published = [&](int at) { return [to, at](int row, float y, float z) { publish(to + at + row, y); }; };
        auto added = [&](int at) {
            return [&shared, &own, to, at](int row, float y, float z) {
                publish(to + at + row, shared.residual[row - own.first] += y);
            };
        };
        auto from_last = [&] {
            float squares = layer > 0 ? receive<D>(shared, from - LAYER + AT_OUT) : sum;
            STAMP();
            return squares;
        };
        multiply<TO_QKV>(ring, batches, from_last, published(AT_QKV));
        STAMP();
        attend(ring, a, parts, layer, norm, from + AT_QKV, to + AT_PARTIALS);
        STAMP();
        auto mixed = [&] {
            /* Most blocks have nothing to attend to, and time. */
            clear(other_set + (long long)layer * LAYER, layer < NUM_LAYERS - 1 ? LAYER : EXCHANGE - layer * LAYER);
            receive_mixed(shared, from + AT_PARTIALS, parts.splits);
            STAMP();
            return 0.0f;
        };
        multiply<TO_MIDDLE>(ring, batches, mixed, added(AT_MIDDLE));
        STAMP();
        auto middle = [&] {
            float squares = receive<D>(shared, from + AT_MIDDLE);
            STAMP();
            return squares;
        };
        multiply<TO_FEED>(ring, batches, middle, [to](int row, float gate, float up) {
            publish(to + AT_FEED + row, __fdividef(gate, 1 + __expf(-gate)) * up);
        });
        STAMP();
        auto fed = [&] {
            receive<F>(shared, from + AT_FEED);
            STAMP();
            return 0.0f;
        };
        multiply<TO_OUT>(ring, batches, fed, added(AT_OUT));
        STAMP();
    }
    auto last = [&] {
        float squares = receive<D>(shared, set + replica + (long long)(NUM_LAYERS - 1) * LAYER + AT_OUT);
        STAMP();
        return squares;
    };
    multiply<TO_SCORES>(ring, batches, last, [&](int row, float y, float z) {
        a.logits[row] = y;
        best.add(y, row);
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
