/* The products of decode.cu: this block's rows of a matrix with a vector, by tensor cores. */
#pragma once

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
