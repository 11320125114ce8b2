// What products with packed weights share, whatever their arithmetic: where results go, and what to
// fetch before it is needed. Included inside the namespace of an instruction set.

// Ahead of the weights in use: four pages, past what the hardware sees.
constexpr int PREFETCH_BYTES = 16384;

// A task's share of simple work: for less, no other core is worth waking.
constexpr int POINTWISE_ELEMENTS = 1 << 14;

// What one task needs while it runs; one for each thread and for all formats.
inline float* task_scratch(size_t floats) {
    static thread_local Scratch<float> scratch;
    return scratch.at_least(floats);
}

// An output that takes vectors.
struct Target : Output {
    // Sixteen rows of token t from row `row` of the part on.
    __attribute__((noinline)) void put(int t, int row, V value) const {
        if (t >= tokens) return;
        const size_t at = static_cast<size_t>(t) * stride + column + row;
        const int n = rows - row;
        if (n >= LANES) {
            store(y + at, residual ? add(load(residual + at), value) : value);
        } else if (n > 0) {
            store_first(y + at, residual ? add(load_first(residual + at, n), value) : value, n);
        }
    }
};

inline void prefetch_lines(const uint8_t* at, int bytes) {
    for (int line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
}

// While chunk c of PANELS panels' units is in use: its share of what lies PREFETCH_BYTES ahead,
// scales and all, from the first byte to the last. Into the second-level cache: the first one's few
// buffers would keep the loads at hand waiting (Zen 4, two threads, Q4_1: 50 GB/s instead of 26;
// leaving out the scales, or taking panel by panel, 18 to 26).
template <Layout F, int PANELS>
inline void prefetch_share(const uint8_t* units, int c) {
    constexpr int share = PANELS * F.unit_bytes() / F.chunks;
    const uint8_t* ahead = units + c * share + PREFETCH_BYTES;
    for (int line = 0; line < share; line += 64) __builtin_prefetch(ahead + line, 0, 2);
}

// Where a thread's run of blocks begins in a weight.
inline const uint8_t* run_start(const Weight& weight, int thread) {
    const Part& part = weight.parts()[0];
    return part.panel(pool().first(part.blocks(), thread) * part.block_panels());
}

// A thread's run of blocks begins where nothing before has prefetched, and ends where prefetching
// on would fetch another thread's: the start of the thread's run in the next weight comes instead.
inline void prefetch_borders(const Part& part, const Weight* next, int block) {
    const int blocks = part.blocks(), thread = pool().owner(blocks, block);
    if (block == pool().first(blocks, thread))
        prefetch_lines(part.panel(block * part.block_panels()), PREFETCH_BYTES);
    if (next && block + 1 == pool().first(blocks, thread + 1))
        prefetch_lines(run_start(*next, thread), PREFETCH_BYTES);
}
