/* What a block of decode.cu reads from memory in a step, and how it gets there in time: through a ring in shared memory. */
#pragma once

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
