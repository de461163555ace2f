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
   out, which takes no longer. All phases go through the same code: multiprocessors were found to be bound by how many
   instructions they are given, and beyond 32 KB of them they wait for more.

   The norms' weights are part of the matrices that follow them. Axes as everywhere: D hidden, H heads, G key/value
   heads, K head width, F feed-forward, V vocabulary; they and the sizes of the launch are compiled in. */

#include <device.cuh>

#define THREADS (WARPS * 32) /* that compute; one more warp copies */
#define QKV ((H + 2 * G) * K)
#define PARTIAL (K + 4)                               /* of one part: sums of values, largest score, sum of weights */
#define POSITIONS_PER_SLOT (SLOT_BYTES / (4 * K))
#define SLOTS_PER_SPLIT 4 /* at least, of a part of the context: every part of a head is one more to put together */
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
    DEVICE int row_bytes() const { return 2 * PADDED(width()); }
    /* Whole tiles of 8 rows, or less than one; a constant for each kind. */
    DEVICE static constexpr int rows_per_slot(int width, int together) {
        int rows = SLOT_BYTES / (2 * PADDED(width));
        return rows >= 32 ? 32 : rows >= 16 ? 16 : rows >= 8 ? 8 : rows / together * together;
    }
    DEVICE int rows_per_slot() const {
        return kind == TO_OUT ? rows_per_slot(F, 1) : kind == TO_MIDDLE ? rows_per_slot(H * K, 1) : rows_per_slot(D, together());
    }
    DEVICE const bf16 *weights(const Arguments &a) const {
        const bf16 *all = kind == TO_QKV ? a.qkv : kind == TO_MIDDLE ? a.o : kind == TO_FEED ? a.gate_up
                        : kind == TO_OUT ? a.down : a.vocabulary;
        return all + (kind == TO_SCORES ? 0 : (long long)layer * groups() * together() * PADDED(width()));
    }
};

#define PRODUCTS (4 * NUM_LAYERS + 1)

DEVICE void copy_rows(Ring &ring, const Arguments &a, const Product &product) {
    Share share(product.groups());
    int bytes = product.row_bytes(), most = product.rows_per_slot(), last = share.last * product.together();
    const char *weights = (const char *)product.weights(a);
    for (int row = share.first * product.together(); row < last; row += most) {
        char *slot = ring.when_empty();
        int count = last - row < most ? last - row : most;
        Barrier *full = &ring.shared.full[ring.slot];
        barrier_arrive_expecting(full, count * bytes);
        copy_to_shared(slot, weights + (long long)row * bytes, count * bytes, full);
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
DEVICE void keep_nothing_behind(Shared &shared, int width) {
#pragma unroll 1
    for (int i = width + threadIdx.x * 2; i < PADDED(width); i += THREADS * 2) keep(shared, i, 0, 0);
}

/* A vector of other blocks, as soon as it is there. */
DEVICE void receive(Shared &shared, const float *from, int width, float *squares) {
    float sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < width; i += THREADS * 4) sum += keep(shared, i, awaited((const float4 *)(from + i)));
    sum = lanes_sum(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    keep_nothing_behind(shared, width);
    threads_meet<THREADS>();
}

/* Call use(group, y, z) in one thread for each group of this block's rows, with its one or two products with the vector
   that was kept; if `squares` are given, with the vector / its rms. `batches` counts on from call to call. */
template <typename Use>
DEVICE void multiply(Ring &ring, const Product &product, const float *squares, int &batches, const Use &use) {
    Shared &shared = ring.shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, together = product.together(), bytes = product.row_bytes();
    int per_slot = product.rows_per_slot(), tile = per_slot < 8 ? per_slot : 8;
    int log_tiles = (per_slot >= 16) + (per_slot >= 32); /* of the tiles in a slot */
    int slots_at_once = TILES >> log_tiles < NUM_SLOTS ? TILES >> log_tiles : NUM_SLOTS;
    Share share(product.groups());
    int first = share.first * together, count = share.count() * together;
#pragma unroll 1
    for (int begin = 0; begin < count; begin += slots_at_once * per_slot, batches++) {
        int rows = count - begin < slots_at_once * per_slot ? count - begin : slots_at_once * per_slot;
        int slots = 1 + (rows > per_slot) + (rows > 2 * per_slot) + (rows > 3 * per_slot);
        Ring ahead = ring;
#pragma unroll 1
        for (int i = 0; i < slots; i++) ahead.when_full(), ahead.next();
        /* A lane gives 16 bytes of each 64 of a row, and 4 lanes all of them; which row, its group of 4 says. */
        const char *at[TILES];
        unsigned swapped[TILES];
        float sums[TILES][4] = {};
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            int left = rows - j * tile < tile ? rows - j * tile : tile, row = lane / 4 < left ? lane / 4 : left - 1;
            int slot = ring.slot + (j >> log_tiles), before = (j & ((1 << log_tiles) - 1)) * 8;
            at[j] = shared.slots[slot < NUM_SLOTS ? slot : slot - NUM_SLOTS] + (before + row) * bytes + lane % 4 * 16;
            swapped[j] = (first + begin + j * tile + row) % 2 * 64;
        }
#pragma unroll 1
        for (unsigned column = warp * 64; column < bytes; column += WARPS * 64) {
            uint4 high = *(const uint4 *)((const char *)shared.high + column + lane % 4 * 16);
            uint4 low = *(const uint4 *)((const char *)shared.low + column + lane % 4 * 16);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                if (j * tile >= rows) continue;
                uint4 w = *(const uint4 *)(at[j] + (column ^ swapped[j]));
                multiply_tile(sums[j], high.x, low.x, high.y, low.y, w.x, w.y);
                multiply_tile(sums[j], high.z, low.z, high.w, low.w, w.z, w.w);
            }
        }
#pragma unroll 1
        for (int i = 0; i < slots; i++) ring.done();
        if (lane < 4) {
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                float2 sum = {sums[j][0] + sums[j][2], sums[j][1] + sums[j][3]};
                *(float2 *)(shared.partials[batches % 2][warp] + j * 8 + lane * 2) = sum;
            }
        }
        threads_meet<THREADS>();
        if (warp != batches % WARPS) continue; /* the others go on meanwhile */
        float y = 0, z = 0, square = 0;
        int row = lane * together, j = (row >= tile) + (row >= 2 * tile) + (row >= 3 * tile), place = row + j * (8 - tile);
        if (row < rows) {
#pragma unroll 4
            for (int other = 0; other < WARPS; other++) {
                y += shared.partials[batches % 2][other][place];
                z += shared.partials[batches % 2][other][place + together - 1];
                if (squares) square += squares[other];
            }
            float scale = squares ? rsqrtf(square * (1.0f / D) + NORM_EPS) : 1;
            use(share.first + (together == 2 ? begin / 2 : begin) + lane, y * scale, z * scale);
        }
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
    sum = lanes_sum(sum);
    if (threadIdx.x % 32 == 0) shared.squares[0][threadIdx.x / 32] = sum;
    keep_nothing_behind(shared, D);
    for (int i = threadIdx.x; i < 2 * K; i += THREADS) {
        shared.turning[i] = a.rotary[(a.position + i / K * (long long)NUM_POSITIONS) * K + i % K];
    }
    threads_meet<THREADS>();
    for (long long i = (blockIdx.x * THREADS + threadIdx.x) * 4; i < SET; i += BLOCKS * THREADS * 4) {
        *(uint4 *)(other_set + i) = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    Best best;
    int batches = 0;
#pragma unroll 1
    for (int number = 0; number < PRODUCTS; number++) {
        Product product(number);
        float *to = set + (long long)product.layer * LAYER, *from = to + replica, *squares = shared.squares[number % 2];
        bool normed = product.kind != TO_MIDDLE && product.kind != TO_OUT;
        if (product.kind == TO_MIDDLE) {
            attend(ring, a, parts, product.layer, norm, from + AT_QKV, to + AT_PARTIALS);
            STAMP();
            receive_mixed(shared, from + AT_PARTIALS, parts.splits);
        } else if (number > 0) {
            int before = product.kind == TO_FEED ? AT_MIDDLE : product.kind == TO_OUT ? AT_FEED : AT_OUT - LAYER;
            receive(shared, from + before, product.width(), squares);
        }
        STAMP();
        multiply(ring, product, normed ? squares : nullptr, batches, [&](int row, float y, float z) {
            if (product.kind == TO_SCORES) {
                a.logits[row] = y;
                best.add(y, row);
                return;
            }
            int at = AT_QKV;
            if (product.kind == TO_FEED) {
                at = AT_FEED;
                y = __fdividef(y, 1 + __expf(-y)) * z;
            } else if (product.kind != TO_QKV) {
                at = product.kind == TO_MIDDLE ? AT_MIDDLE : AT_OUT;
                y = shared.residual[row - own.first] += y;
            }
            publish(to + at + row, y);
        });
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
