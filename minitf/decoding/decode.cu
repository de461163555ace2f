/* One step of decoding on a GPU in one kernel: the next token's scores of one text, from the key/value cache.

   At batch 1 a step is bound by reading the weights, and a kernel for each product would spend its time on starting.
   Here one block of threads stays on every multiprocessor for the whole step.

   Weights do not depend on what is computed. One thread of each block copies the rows the block will need, in the order
   of use, into a ring of slots in shared memory, always as far ahead as there is room; the keys and values of the cache
   go the same way.

   Vectors go from block to block through memory without barriers. Where a value will be, there is first a pattern that
   no value has (all bits set); whoever needs it looks until it is there. Every value of a step has a place of its own;
   steps take turns with two sets of places, and each step clears the set of the other. A set is there several times: 8 KB
   that all multiprocessors read at once took each of them 4,000 clocks, and from eight places 1,900.

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

#include <copying.cuh>
#include <vectors.cuh>
#include <products.cuh>
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
