/* decode.cu as a function of the processor; 0: done, 1: some thread waits for ever. */
#include <decode.cu>

static const Arguments *arguments;
static void run_fiber() {
    decode(*arguments);
    running->done = true;
    others_first();
}

extern "C" int launch(const Arguments *given, unsigned seed) {
    arguments = given;
    warps_per_block = WARPS + 1;
    int threads = warps_per_block * 32;
    std::mt19937 random(seed);
    warps.assign(BLOCKS * warps_per_block, {});
    all_meetings.assign(BLOCKS, {}), some_meetings.assign(BLOCKS, {});
    copies.clear();
    std::vector<std::unique_ptr<char[]>> blocks;
    memories.clear();
    for (int block = 0; block < BLOCKS; block++) {
        blocks.emplace_back(new char[sizeof(Shared) + 128]);
        memset(blocks.back().get(), 0xff, sizeof(Shared) + 128);
        memories.push_back((char *)(((uintptr_t)blocks.back().get() + 127) / 128 * 128));
    }
    std::vector<Fiber> fibers(BLOCKS * threads);
    std::vector<Fiber *> left;
    for (int i = 0; i < (int)fibers.size(); i++) {
        Fiber &fiber = fibers[i];
        fiber.thread = {(unsigned)i % threads}, fiber.block = {(unsigned)i / threads};
        constexpr int stack_bytes = 1 << 15;
        fiber.stack.reset(new char[stack_bytes]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
        left.push_back(&fiber);
    }
    for (int round = 0; !left.empty(); round++) {
        if (round == 200000) return 1;
        std::swap(left[random() % left.size()], left[0]); /* whole orders would cost more than the kernel */
        size_t first = random() % left.size();
        for (size_t i = 0; i < left.size(); i++) {
            running = left[(first + i) % left.size()];
            swapcontext(&scheduler, &running->context);
        }
        std::erase_if(left, [](Fiber *fiber) { return fiber->done; });
        while (!copies.empty() && random() % 4) {
            Copy copy = copies.front();
            copies.pop_front();
            memcpy(copy.to, copy.from, copy.bytes);
            copy.barrier->bytes -= copy.bytes;
            turn_if_done(copy.barrier);
        }
    }
    return 0;
}
extern "C" unsigned shared_bytes() { return sizeof(Shared); }
extern "C" unsigned exchange_floats() { return SET; }
