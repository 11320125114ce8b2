// Causal attention over paged FP16 keys and values. Included inside the namespace of an instruction
// set.
//
// Slots are taken in blocks of 256, counted from the request's first token. A query's part in a
// block is its own softmax: scores times log2 e (each a sum over the head's elements, in order),
// their maximum m, weights 2^(s - m), their sum l, and the mix of values (slot after slot). Blocks
// are then merged one after the other (Milakov and Gimelshein 2018; Dao et al. 2022). A part
// depends on nothing but the query and the block's slots that it sees: not on the chunk that the
// query came in, nor on who computes it. One token's blocks are spread over the threads and merged
// in order; a prompt's are merged as they come.
//
// Rows are the queries that share a kv head: token after token, within a token head after head.

constexpr int BLOCK_SLOTS = 256;
constexpr int BLOCK_PAGES = BLOCK_SLOTS / PAGE;
constexpr int ROW_TILE = TILE_TOKENS;
// What is fetched ahead while a decoded token's blocks are computed: enough for a memory that takes
// its time, little enough to stay in the second-level cache.
constexpr int AHEAD_BYTES = 1 << 15;
// Queries that meet a block once it is expanded to float32: the more the cheaper, but few rows are
// spread over the threads.
constexpr int LEAST_ROWS = 96, MOST_ROWS = 384, TASKS_A_THREAD = 8;

// A softmax over some slots: the largest score, and the sum of 2^(score - largest).
struct Partial {
    float most, total;
};

template <class T>
inline void prefetch(const T* from, int n) {
    prefetch_lines(reinterpret_cast<const uint8_t*>(from), n * static_cast<int>(sizeof(T)));
}

// What will be read soon, in the order of reading: fetched into the second-level cache, as many
// bytes as are read, of four pages abreast. Memory gives more to several runs of addresses at a
// time (Intel, two threads: 29 GB/s instead of 23 where four heads share a kv head).
class Ahead {
  public:
    static constexpr int ABREAST = 4;
    // Bytes that a fetch stands for.
    static constexpr int STEP = 64 * ABREAST;

    // Runs of one length are fetched together.
    void add(const void* run, int bytes) {
        if (runs_ % ABREAST && bytes != bytes_[runs_ / ABREAST]) fill();
        if (runs_ % ABREAST == 0) bytes_[runs_ / ABREAST] = bytes;
        at_[runs_++] = static_cast<const uint8_t*>(run);
    }
    // Nothing is added any more.
    void fill() {
        for (; runs_ % ABREAST; ++runs_) at_[runs_] = at_[runs_ - 1];
    }
    void fetch() {
        if (line_ >= stop_) {
            if (next_ == runs_) return;
            group_ = at_ + next_;
            line_ = 0;
            stop_ = bytes_[next_ / ABREAST];
            next_ += ABREAST;
        }
        for (int i = 0; i < ABREAST; ++i) __builtin_prefetch(group_[i] + line_, 0, 2);
        line_ += 64;
    }

  private:
    // Keys and values of a block and of another's beginning, each filled up.
    static constexpr int MOST_RUNS = 4 * BLOCK_PAGES + 2 * ABREAST;
    int line_ = 0, stop_ = 0, next_ = 0, runs_ = 0;
    const uint8_t** group_ = nullptr;
    const uint8_t* at_[MOST_RUNS];
    int bytes_[MOST_RUNS / ABREAST];
};

constexpr int HALF_BYTES = LANES * static_cast<int>(sizeof(uint16_t));

// The same pointer, of which the compiler does not know that: it reads again what it would rather
// keep, and store for want of registers.
inline const float* again(const float* p) {
    asm volatile("" : "+r"(p));
    return p;
}

// y[t][p] += sum over k of x[t * t_step + k * k_step] * w[k][p]; one chain each, k after k. Halves
// are read from memory: as many bytes are fetched ahead.
template <int ROWS, int PANELS, bool HALF>
inline void products(const float* x, int t_step, int k_step, const void* const (&w)[PANELS],
                     Ahead* ahead, int w_step, int n, V (&y)[ROWS][PANELS]) {
    constexpr bool crowded = ROWS * PANELS + PANELS + 1 > REGISTERS;
    for (int k = 0; k < n; ++k) {
        if constexpr (HALF)
            if (k * PANELS * HALF_BYTES % Ahead::STEP == 0) ahead->fetch();
        for (int p = 0; p < PANELS; ++p) {
            V a;
            if constexpr (HALF) a = load_f16(static_cast<const uint16_t*>(w[p]) + k * w_step);
            else a = load(static_cast<const float*>(w[p]) + k * w_step);
            const float* of = (crowded ? again(x) : x) + k * k_step;
            for (int t = 0; t < ROWS; ++t) y[t][p] = fma(a, splat(of[t * t_step]), y[t][p]);
        }
    }
}

// Panels at a time for so many rows: as many sums as registers hold.
constexpr int panels_for(int rows) {
    constexpr int sums = TILE_TOKENS * TILE_PANELS;
    return rows * 4 <= sums ? 4 : rows * 2 <= sums ? 2 : 1;
}

// The slots of one block of one kv head: as halves in their pages, or expanded once for many rows.
struct Block {
    int start, slots;  // first slot, and how many are written
    const uint16_t *keys[BLOCK_PAGES], *values[BLOCK_PAGES];
    Ahead* ahead;                          // where halves are read
    const float *wide_keys, *wide_values;  // [page][dim][16] and [slot][padded dim], or null
    int dim, padded;
    bool finite;  // whether all values are: 0 * infinity would not be 0

    int pages() const { return (slots + PAGE - 1) / PAGE; }
    // Adds pages [from, stop) in the order of reading, all keys and then all values, as far as
    // there are any.
    void add_to(Ahead& path, int from, int stop) const {
        const int page_bytes = PAGE * dim * static_cast<int>(sizeof(uint16_t));
        const int n = pages();
        for (int i = from; i < std::min(stop, 2 * n); ++i)
            path.add(i < n ? keys[i] : values[i - n], page_bytes);
    }
};

// A tile of up to ROW_TILE rows: queries [dim][ROWS], scaled; the last slot that each row sees, and
// the first.
struct Queries {
    const float* x;
    int last[ROW_TILE], from[ROW_TILE];
    int rows;
};

template <int ROWS>
inline void block_scores(const Block& block, const Queries& q, int pages, float* scores) {
    constexpr int wide = panels_for(ROWS);
    const auto some = [&]<int PANELS>(int page) {
        const void* at[PANELS];
        V y[ROWS][PANELS];
        for (int t = 0; t < ROWS; ++t)
            for (int p = 0; p < PANELS; ++p) y[t][p] = zero();
        if (block.wide_keys) {
            for (int p = 0; p < PANELS; ++p)
                at[p] = block.wide_keys + (page + p) * block.dim * PAGE;
            products<ROWS, PANELS, false>(q.x, 1, ROWS, at, nullptr, PAGE, block.dim, y);
        } else {
            for (int p = 0; p < PANELS; ++p) at[p] = block.keys[page + p];
            products<ROWS, PANELS, true>(q.x, 1, ROWS, at, block.ahead, PAGE, block.dim, y);
        }
        for (int t = 0; t < ROWS; ++t)
            for (int p = 0; p < PANELS; ++p)
                store(scores + t * BLOCK_SLOTS + (page + p) * PAGE, y[t][p]);
    };
    int page = 0;
    for (; page + wide <= pages; page += wide) some.template operator()<wide>(page);
    for (; page < pages; ++page) some.template operator()<1>(page);
}

// The largest of a row's scores of `pages` pages; those of slots outside [from, last] become -inf.
inline float block_most(float* scores, int pages, int from, int last) {
    const V nothing = splat(-INFINITY);
    V most = nothing;
    for (int p = 0; p < pages; ++p) {
        V s = load(scores + p * PAGE);
        const int stop = last + 1 - p * PAGE, start = from - p * PAGE;
        if (stop < PAGE || start > 0) {
            s = first(s, std::clamp(stop, 0, PAGE), nothing);
            s = first(nothing, std::clamp(start, 0, PAGE), s);
            store(scores + p * PAGE, s);
        }
        most = max(most, s);
    }
    return largest(most);
}

// Turns a row's scores into weights; returns their sum.
inline float block_weights(float* scores, int pages, float most) {
    V total = zero();
    for (int p = 0; p < pages; ++p) {
        const V w = exp2(sub(load(scores + p * PAGE), splat(most)));
        store(scores + p * PAGE, w);
        total = add(total, w);
    }
    return sum(total);
}

// Mixes the values of a block's first `slots` slots: y[t][padded]. Halves page by page, as they lie
// in memory and a first-level cache holds them; sums are put away in between.
template <int ROWS>
inline void block_mix(const Block& block, const float* weights, int slots, float* y) {
    constexpr int wide = panels_for(ROWS);
    const int run = block.wide_values ? slots : PAGE;
    std::fill_n(y, ROWS * block.padded, 0.0f);
    for (int slot = 0; slot < slots; slot += run) {
        const int n = std::min(run, slots - slot);
        const auto some = [&]<int PANELS>(int d) {
            const auto each_sum = [&](const auto& use) {
                for (int t = 0; t < ROWS; ++t)
                    for (int p = 0; p < PANELS; ++p)
                        use(t, p, y + t * block.padded + d + p * LANES);
            };
            V sums[ROWS][PANELS];
            each_sum([&](int t, int p, const float* at) { sums[t][p] = load(at); });
            const void* at[PANELS];
            if (block.wide_values) {
                for (int p = 0; p < PANELS; ++p) at[p] = block.wide_values + d + p * LANES;
                products<ROWS, PANELS, false>(weights, BLOCK_SLOTS, 1, at, nullptr, block.padded, n,
                                              sums);
            } else {
                const uint16_t* values = block.values[slot / PAGE] + d;
                for (int p = 0; p < PANELS; ++p) at[p] = values + p * LANES;
                products<ROWS, PANELS, true>(weights + slot, BLOCK_SLOTS, 1, at, block.ahead,
                                             block.dim, n, sums);
            }
            each_sum([&](int t, int p, float* at) { store(at, sums[t][p]); });
        };
        int d = 0;
        for (; d + wide * LANES <= block.padded; d += wide * LANES)
            some.template operator()<wide>(d);
        for (; d < block.padded; d += LANES) some.template operator()<1>(d);
    }
}

// One row alone, over just the slots it sees: where a later token's value is not finite.
inline void row_mix(const Block& block, const float* weights, int from, int last, float* y) {
    for (int d = 0; d < block.padded; d += LANES) {
        V mixed = zero();
        for (int s = std::max(0, from); s <= last; ++s)
            mixed = fma(load(block.wide_values + s * block.padded + d), splat(weights[s]), mixed);
        store(y + d, mixed);
    }
}

// The parts of a tile's rows in a block: y [ROWS][padded].
template <int ROWS>
__attribute__((noinline)) void block_parts(const Block& block, const Queries& q, float* scores,
                                           Partial* parts, float* y) {
    int last = -1;
    for (int t = 0; t < q.rows; ++t) last = std::max(last, q.last[t] - block.start);
    const int slots = std::min(block.slots, last + 1), pages = (slots + PAGE - 1) / PAGE;
    block_scores<ROWS>(block, q, pages, scores);
    // All rows' maxima before any row's weights: nobody waits for the end of a reduction.
    for (int t = 0; t < ROWS; ++t) {
        const int row = std::min(t, q.rows - 1);
        const int from = q.from[row] - block.start, to = q.last[row] - block.start;
        const bool sees = to >= 0 && from < slots;
        parts[t].most = sees ? block_most(scores + t * BLOCK_SLOTS, pages, from, to) : -INFINITY;
        parts[t].total = sees;
    }
    for (int t = 0; t < ROWS; ++t) {
        float* row = scores + t * BLOCK_SLOTS;
        if (parts[t].total != 0.0f) parts[t].total = block_weights(row, pages, parts[t].most);
        else std::fill_n(row, pages * PAGE, 0.0f);
    }
    if (block.finite) return block_mix<ROWS>(block, scores, slots, y);
    for (int t = 0; t < q.rows; ++t)
        row_mix(block, scores + t * BLOCK_SLOTS, q.from[t] - block.start,
                std::min(slots - 1, q.last[t] - block.start), y + t * block.padded);
}

// The running softmaxes of a tile's rows take in the next block's parts.
inline void merge(Partial* sums, float* mixed, const Partial* parts, const float* y, int rows,
                  int padded) {
    alignas(64) float keep[(ROW_TILE + LANES - 1) / LANES * LANES] = {}, take[std::size(keep)] = {};
    for (int t = 0; t < rows; ++t) {
        const float most = parts[t].most > sums[t].most ? parts[t].most : sums[t].most;
        keep[t] = sums[t].most - most;
        take[t] = parts[t].most - most;
    }
    for (int t = 0; t < rows; t += LANES) {
        store(keep + t, exp2(load(keep + t)));
        store(take + t, exp2(load(take + t)));
    }
    for (int t = 0; t < rows; ++t, mixed += padded, y += padded) {
        Partial& sum = sums[t];
        const Partial& part = parts[t];
        if (part.total == 0.0f) continue;  // saw nothing there; a NaN is not 0
        if (sum.total == 0.0f) {
            sum = part;
            std::memcpy(mixed, y, sizeof(float) * static_cast<size_t>(padded));
            continue;
        }
        sum.most = part.most > sum.most ? part.most : sum.most;
        sum.total = sum.total * keep[t] + part.total * take[t];
        const V old = splat(keep[t]), next = splat(take[t]);
        for (int d = 0; d < padded; d += LANES)
            store(mixed + d, fma(load(y + d), next, mul(load(mixed + d), old)));
    }
}

// One segment and kv head, and what every task over them needs.
struct Attended {
    const float* q;
    const Segment* segment;
    const Pages* pages;
    int kv_head, window, padded;
    float* y;

    int shared() const { return pages->heads / pages->kv_heads; }
    int tokens() const { return segment->stop - segment->first; }
    int rows() const { return tokens() * shared(); }
    int tiles() const { return (rows() + ROW_TILE - 1) / ROW_TILE; }
    int last(int row) const { return segment->position + row / shared(); }
    int from(int row) const { return window ? std::max(0, last(row) - window + 1) : 0; }
    // Calls use(tile, first row, rows) for tiles of about equal size.
    template <class Use>
    void each_tile(const Use& use) const {
        for (int i = 0; i < tiles(); ++i) {
            const int first = rows() * i / tiles();
            use(i, first, rows() * (i + 1) / tiles() - first);
        }
    }
    size_t at(int row) const {
        return (static_cast<size_t>(segment->first + row / shared()) * pages->heads +
                kv_head * shared() + row % shared()) *
               pages->dim;
    }

    // Rows [row, row + n) as a tile of `size`: [dim][size], times log2 e / sqrt(dim).
    void queries(int row, int n, int size, float* x, Queries& out) const {
        const auto scale = static_cast<float>(1.4426950408889634 / std::sqrt(pages->dim));
        out.x = x;
        out.rows = n;
        for (int t = 0; t < size; ++t) {
            const int from_row = row + std::min(t, n - 1), dim = pages->dim;
            const float* of = q + at(from_row);
            // The next tile's: tokens are far apart, and another thread may have turned them.
            prefetch(q + at(std::min(rows() - 1, from_row + ROW_TILE)), dim);
            for (int d = 0; d < dim; ++d) x[d * size + t] = of[d] * scale;
            if (t < n) {
                out.last[t] = last(from_row);
                out.from[t] = from(from_row);
            }
        }
    }

    // Block `index`, of which slots up to `last` are written.
    Block block(int index, int last_slot) const {
        Block b{};
        b.start = index * BLOCK_SLOTS;
        b.slots = std::min(BLOCK_SLOTS, last_slot + 1 - b.start);
        b.dim = pages->dim;
        b.padded = padded;
        b.finite = true;
        for (int p = 0; p * PAGE < b.slots; ++p) {
            const size_t page = pages->at(segment->table[index * BLOCK_PAGES + p], kv_head);
            b.keys[p] = pages->keys + page;
            b.values[p] = pages->values + page;
        }
        return b;
    }
    Block block(int index) const { return block(index, last(rows() - 1)); }

    // Pages of keys or values that are fetched ahead.
    int lead() const {
        return std::min(AHEAD_BYTES / (PAGE * pages->dim * static_cast<int>(sizeof(uint16_t))),
                        2 * BLOCK_PAGES);
    }

    void finish(int row, const Partial& sum, const float* mixed) const {
        const V inverse = splat(sum.total);
        float* out = y + at(row);
        for (int d = 0; d < pages->dim; d += LANES) {
            const V value = div(load(mixed + d), inverse);
            if (d + LANES <= pages->dim) store(out + d, value);
            else store_first(out + d, value, pages->dim - d);
        }
    }
};

// Expands a block to float32 in `memory`: (16 + 1) pages' worth of keys and values.
inline void widen(Block& block, float* memory) {
    const int pages = block.pages();
    float *keys = memory, *values = memory + static_cast<size_t>(BLOCK_SLOTS) * block.dim;
    for (int p = 0; p < pages; ++p)
        for (int d = 0; d < block.dim; ++d)
            store(keys + (p * block.dim + d) * PAGE, load_f16(block.keys[p] + d * PAGE));
    V probe = zero();  // 0 * value: 0 for finite ones, NaN for the others
    for (int s = 0; s < block.slots; ++s) {
        const uint16_t* value = block.values[s / PAGE] + s % PAGE * block.dim;
        float* to = values + static_cast<size_t>(s) * block.padded;
        int d = 0;
        for (; d + LANES <= block.dim; d += LANES) {
            const V wide = load_f16(value + d);
            probe = fma(wide, zero(), probe);
            store(to + d, wide);
        }
        if (d < block.padded) {
            alignas(64) uint16_t rest[LANES] = {};
            std::memcpy(rest, value + d, sizeof(uint16_t) * static_cast<size_t>(block.dim - d));
            const V wide = load_f16(rest);
            probe = fma(wide, zero(), probe);
            store(to + d, wide);
        }
    }
    block.wide_keys = keys;
    block.wide_values = values;
    block.finite = sum(probe) == 0.0f;
}

// Fetches share `i` of `n` of a block's halves.
inline void prefetch_pages(const Block& block, int i, int n) {
    const int pages = block.pages();
    for (int p = pages * i / n; p < pages * (i + 1) / n; ++p) {
        prefetch(block.keys[p], PAGE * block.dim);
        prefetch(block.values[p], PAGE * block.dim);
    }
}

inline size_t widened_floats(int dim, int padded) {
    return static_cast<size_t>(BLOCK_SLOTS) * (dim + padded);
}

// Many rows, of which a task takes some through all blocks.
inline void attend_rows(const Attended& a, int first, int stop) {
    static thread_local Scratch<float> scratch;
    const int dim = a.pages->dim, padded = a.padded, rows = stop - first;
    const size_t wide = widened_floats(dim, padded),
                 row_floats = static_cast<size_t>(rows) * padded;
    const int tiles = (rows + ROW_TILE - 1) / ROW_TILE;
    float* memory =
        scratch.at_least(wide + row_floats + static_cast<size_t>(tiles) * ROW_TILE * dim +
                         ROW_TILE * (BLOCK_SLOTS + padded));
    float *mixed = memory + wide, *x = mixed + row_floats;
    float *scores = x + static_cast<size_t>(tiles) * ROW_TILE * dim,
          *y = scores + ROW_TILE * BLOCK_SLOTS;
    Partial sums[MOST_ROWS] = {}, parts[ROW_TILE];
    Queries queries[(MOST_ROWS + ROW_TILE - 1) / ROW_TILE];
    for (int i = 0; i < tiles; ++i) {
        const int n = std::min(ROW_TILE, rows - i * ROW_TILE);
        a.queries(first + i * ROW_TILE, n, tile_for(n), x + static_cast<size_t>(i) * ROW_TILE * dim,
                  queries[i]);
    }
    const int last = a.last(stop - 1);
    for (int index = a.from(first) / BLOCK_SLOTS; index * BLOCK_SLOTS <= last; ++index) {
        Block block = a.block(index, last);
        widen(block, memory);
        const Block next = (index + 1) * BLOCK_SLOTS <= last ? a.block(index + 1, last) : Block{};
        for (int i = 0; i < tiles; ++i) {
            const int n = queries[i].rows, start = block.start;
            prefetch_pages(next, i, tiles);
            if (queries[i].last[n - 1] < start || queries[i].from[0] >= start + block.slots)
                continue;
            with_tile(tile_for(n),
                      [&]<int ROWS>() { block_parts<ROWS>(block, queries[i], scores, parts, y); });
            merge(sums + i * ROW_TILE, mixed + static_cast<size_t>(i) * ROW_TILE * padded, parts, y,
                  n, padded);
        }
    }
    for (int t = 0; t < rows; ++t)
        a.finish(first + t, sums[t], mixed + static_cast<size_t>(t) * padded);
}

// A decoded token and its heads, or a single tile of rows: blocks are tasks of their own. Returns
// the parts in `parts` [tile][ROW_TILE] and `y` [tile][ROW_TILE][padded]. `add_following` adds what
// is read after the block to an Ahead, up to the given number of pages.
template <class AddFollowing>
inline void attend_block(const Attended& a, int index, const AddFollowing& add_following,
                         Partial* parts, float* y) {
    static thread_local Scratch<float> scratch;
    const int dim = a.pages->dim;
    float* memory =
        scratch.at_least(widened_floats(dim, a.padded) + ROW_TILE * (dim + BLOCK_SLOTS));
    float *x = memory + widened_floats(dim, a.padded), *scores = x + ROW_TILE * dim;
    Block block = a.block(index);
    const int lead = a.lead();
    Ahead ahead;
    block.add_to(ahead, lead, 2 * BLOCK_PAGES);
    add_following(ahead, lead);
    ahead.fill();
    block.ahead = &ahead;
    // An infinity must not reach a token that does not see it, earlier or beyond its window: look
    // at the values.
    if (dim % LANES || a.window || a.tokens() > 1) widen(block, memory);
    a.each_tile([&](int tile, int first, int n) {
        Queries q;
        a.queries(first, n, tile_for(n), x, q);
        with_tile(tile_for(n), [&]<int ROWS>() {
            block_parts<ROWS>(block, q, scores, parts + tile * ROW_TILE,
                              y + tile * ROW_TILE * a.padded);
        });
    });
}

inline int rows_a_task(const std::vector<Segment>& segments, const Pages& pages) {
    int rows = 0;
    for (const Segment& segment : segments) rows += (segment.stop - segment.first) * pages.heads;
    const int some = rows / (TASKS_A_THREAD * pool().threads());
    return std::clamp(some / LEAST_ROWS * LEAST_ROWS, LEAST_ROWS, MOST_ROWS);
}

inline void attention(const float* q, const std::vector<Segment>& segments, const Pages& pages,
                      int window, const Weight* next, float* y) {
    const int padded = (pages.dim + LANES - 1) / LANES * LANES;
    struct Task {
        Attended a;
        int first, stop;  // rows, or blocks where these are tasks
        int slot;         // of the first block's first tile, -1 for many rows
    };
    static thread_local std::vector<Task> tasks, singles;
    static thread_local Scratch<float> scratch;
    tasks.clear();
    singles.clear();
    const int some = rows_a_task(segments, pages);
    int slots = 0;
    for (const Segment& segment : segments) {
        const size_t first_single = singles.size();
        int from = 0, stop = 0;
        for (int g = 0; g < pages.kv_heads; ++g) {
            const Attended a{q, &segment, &pages, g, window, padded, y};
            const int rows = a.rows();
            if (rows > ROW_TILE && a.tokens() > 1) {
                // The last rows see the most: begin with them.
                for (int first = (rows - 1) / some * some; first >= 0; first -= some)
                    tasks.push_back({a, first, std::min(rows, first + some), -1});
                continue;
            }
            from = a.from(0) / BLOCK_SLOTS, stop = a.last(rows - 1) / BLOCK_SLOTS + 1;
            singles.push_back({a, from, stop, slots});
            slots += (stop - from) * a.tiles();
        }
        // Block by block, as pages lie in memory: a page has all kv heads.
        for (int index = from; index < stop; ++index)
            for (size_t i = first_single; i < singles.size(); ++i)
                tasks.push_back({singles[i].a, index, index + 1,
                                 singles[i].slot + (index - from) * singles[i].a.tiles()});
    }
    const size_t part_floats = static_cast<size_t>(ROW_TILE) * padded;
    const size_t parts_floats =
        static_cast<size_t>(slots) * ROW_TILE * sizeof(Partial) / sizeof(float);
    float* mixes = scratch.at_least(slots * part_floats + parts_floats + LANES);
    auto* parts = reinterpret_cast<Partial*>(mixes + slots * part_floats);
    const std::vector<Task>&all = tasks, &few = singles;
    const int n = static_cast<int>(all.size());
    pool().run(n, [&](int i) {
        const Task& task = all[static_cast<size_t>(i)];
        if (task.slot < 0) return attend_rows(task.a, task.first, task.stop);
        const auto add_following = [&](Ahead& ahead, int pages) {
            const int thread = pool().owner(n, i);
            if (i + 1 < pool().first(n, thread + 1)) {
                const Task& after = all[static_cast<size_t>(i) + 1];
                if (after.slot >= 0) after.a.block(after.first).add_to(ahead, 0, pages);
            } else if (next) {
                constexpr int part = AHEAD_BYTES / Ahead::ABREAST;
                for (int at = 0; at < AHEAD_BYTES; at += part)
                    ahead.add(run_start(*next, thread) + at, part);
            }
        };
        attend_block(task.a, task.first, add_following,
                     parts + static_cast<size_t>(task.slot) * ROW_TILE,
                     mixes + task.slot * part_floats);
    });
    for (const Task& single : few) {
        single.a.each_tile([&](int tile, int first, int rows) {
            Partial sums[ROW_TILE] = {};
            float* mixed = mixes + (single.slot + tile) * part_floats;
            for (int block = 0; block < single.stop - single.first; ++block) {
                const int slot = single.slot + block * single.a.tiles() + tile;
                merge(sums, mixed, parts + static_cast<size_t>(slot) * ROW_TILE,
                      mixes + slot * part_floats, rows, padded);
            }
            for (int row = 0; row < rows; ++row)
                single.a.finish(first + row, sums[row], mixed + static_cast<size_t>(row) * padded);
        });
    }
}
