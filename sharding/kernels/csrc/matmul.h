// y = residual + x @ weight^T on packed weights. Included inside the namespace of an instruction
// set.
//
// An output element is reduced in one order, whatever the number of tokens: within a group of 16 or
// 32 columns s = sum of q * x, column after column; then y += scale * s, y += minimum * (sum of x),
// group after group; then the residual. Lanes run over rows. The bound is in docs/numerics.md.
//
// One or two tokens: weights are decoded in registers as they stream by. More: a panel is decoded
// to float32 in the cache once, and meets the tokens in tiles. Which way is taken changes no bit.

// Decoded at a time: 16 KiB, half a first-level cache.
constexpr int DECODED_COLUMNS = 256 / TILE_PANELS;

// Activations as kernels want them: tiles of N tokens, chunk by chunk [N][32], times 2^-excess; and
// one number a group [N], the sum of its activations (times -offset where the format has one).
struct Prepared {
    const float *columns, *sums;
};

template <Layout F>
constexpr int sum_groups() {
    return F.has_minimum() || F.offset != 0 ? F.groups : 0;
}

template <Layout F>
inline void prepare_tile(const float* x, int tokens, int width, int padded, int tile,
                         float* columns, float* sums) {
    constexpr int groups = sum_groups<F>();
    const V low = load(DOWNSCALE<F>.of), high = load(DOWNSCALE<F>.of + 16);
    for (int t = 0; t < tile; ++t) {
        // Tokens that fill up a tile are copies of the last: no new infinities, and no cost.
        const float* row = x + static_cast<size_t>(t < tokens ? t : tokens - 1) * width;
        for (int k = 0; k < padded; k += CHUNK) {
            const int left = width - k;
            const V a = left >= 16 ? load(row + k) : load_first(row + k, left > 0 ? left : 0);
            const V b = left >= 32 ? load(row + k + 16)
                                   : load_first(row + k + 16, left > 16 ? left - 16 : 0);
            float* to = columns + k * tile + t * CHUNK;
            store(to, mul(a, low));
            store(to + 16, mul(b, high));
            float* of = sums + k / CHUNK * groups * tile + t;
            if constexpr (groups == 1) {
                of[0] = sum(add(a, b)) * (F.offset ? -F.offset : 1);
            } else if constexpr (groups == 2) {
                of[0] = sum(a) * (F.offset ? -F.offset : 1);
                of[tile] = sum(b) * (F.offset ? -F.offset : 1);
            }
        }
    }
}

// The sums of PANELS x TOKENS over all columns, weights decoded on the way. Not inlined: blocks of
// several widths share it.
template <Layout F, int PANELS, int TOKENS>
__attribute__((noinline)) void stream(const uint8_t* base, size_t unit_stride, int units,
                                      const Prepared& x, V (&y)[PANELS][TOKENS]) {
    constexpr int group_columns = CHUNK / F.groups, groups = sum_groups<F>();
    const Table table = load_table(NONLINEAR);
    for (int p = 0; p < PANELS; ++p)
        for (int t = 0; t < TOKENS; ++t) y[p][t] = zero();
    const float *columns = x.columns, *sums = x.sums;
    for (int u = 0; u < units; ++u, base += unit_stride) {
        for (int c = 0; c < F.chunks; ++c) {
            prefetch_share<F, PANELS>(base, c);
            unrolled<0, F.groups>([&]<int G>() __attribute__((always_inline)) {
                V s[PANELS][TOKENS];
                for (int p = 0; p < PANELS; ++p)
                    for (int t = 0; t < TOKENS; ++t)
                        s[p][t] = F.offset ? splat(sums[G * TOKENS + t]) : zero();
                unrolled<G * group_columns, group_columns>(
                    [&]<int K>() __attribute__((always_inline)) {
                        for (int p = 0; p < PANELS; ++p) {
                            const uint8_t* chunk = base + p * F.unit_bytes() + c * F.chunk_bytes();
                            const V w = value<F, K>(chunk, table);
                            for (int t = 0; t < TOKENS; ++t)
                                s[p][t] = fma(w, splat(columns[t * CHUNK + K]), s[p][t]);
                        }
                    });
                for (int p = 0; p < PANELS; ++p) {
                    const uint8_t* unit = base + p * F.unit_bytes();
                    if constexpr (F.scale == 0) {
                        for (int t = 0; t < TOKENS; ++t) y[p][t] = add(y[p][t], s[p][t]);
                    } else {
                        const V d = scale<F>(unit, c * F.groups + G);
                        for (int t = 0; t < TOKENS; ++t) y[p][t] = fma(d, s[p][t], y[p][t]);
                    }
                    if constexpr (F.has_minimum()) {
                        const V m = minimum<F>(unit, c * F.groups + G);
                        for (int t = 0; t < TOKENS; ++t)
                            y[p][t] = fma(m, splat(sums[G * TOKENS + t]), y[p][t]);
                    }
                }
            });
            columns += CHUNK * TOKENS;
            sums += groups * TOKENS;
        }
    }
}

// Panels decoded to float32: values [column][16], scales and minima [group][16].
struct Decoded {
    float *values, *scales, *minima;
};

// Chunks [first, first + n) of a panel.
template <Layout F>
inline void decode_panel(const uint8_t* panel, size_t unit_stride, int first, int n, Decoded out) {
    const Table table = load_table(NONLINEAR);
    for (int i = 0; i < n; ++i) {
        const uint8_t* unit = panel + static_cast<size_t>((first + i) / F.chunks) * unit_stride;
        const int c = (first + i) % F.chunks;
        const uint8_t* chunk = unit + c * F.chunk_bytes();
        // The same panel's next piece: the panels of a block lie in turn, which hides the stride.
        const size_t ahead = static_cast<size_t>(std::max(1, n / F.chunks)) * unit_stride;
        for (int line = 0; line < F.chunk_bytes(); line += 64)
            __builtin_prefetch(chunk + ahead + line);
        float* values = out.values + static_cast<size_t>(i) * CHUNK * LANES;
        unrolled<0, CHUNK>([&]<int K>() __attribute__((always_inline)) {
            store(values + K * LANES, value<F, K>(chunk, table));
        });
        for (int g = 0; g < F.groups; ++g) {
            const int at = (i * F.groups + g) * LANES;
            if constexpr (F.scale != 0) store(out.scales + at, scale<F>(unit, c * F.groups + g));
            if constexpr (F.has_minimum())
                store(out.minima + at, minimum<F>(unit, c * F.groups + g));
        }
    }
}

// What the tile kernel must know of a format.
struct Arithmetic {
    int group_columns;
    bool scaled, minimum, offset;
};
template <Layout F>
constexpr Arithmetic arithmetic() {
    return {CHUNK / F.groups, F.scale != 0, F.has_minimum(), F.offset != 0};
}

// y[t][p] += the sums of decoded panels over `groups` groups; y is [TOKENS][PANELS][16]. `ahead` is
// what lies as far from `columns` as the next tile's, fetched meanwhile: chunks of a tile are too
// short a run for the hardware to see. Not inlined: formats of one arithmetic share it.
template <Arithmetic A, int TOKENS, int PANELS>
__attribute__((noinline)) void tile(const Decoded (&panels)[PANELS], int groups,
                                    const float* columns, size_t ahead, const float* sums,
                                    float* y) {
    constexpr int group_bytes = TOKENS * A.group_columns * static_cast<int>(sizeof(float));
    // A copy, as compilers cannot know that y is none of the inputs and would store it twice.
    V total[TOKENS][PANELS];
    for (int t = 0; t < TOKENS; ++t)
        for (int p = 0; p < PANELS; ++p) total[t][p] = load(y + (t * PANELS + p) * LANES);
    for (int g = 0; g < groups; ++g) {
        const auto* next = reinterpret_cast<const uint8_t*>(columns + ahead) + g * group_bytes;
        for (int line = 0; line < group_bytes; line += 64) __builtin_prefetch(next + line);
        V s[TOKENS][PANELS];
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p)
                s[t][p] = A.offset ? splat(sums[g * TOKENS + t]) : zero();
        const float* at[PANELS];
        for (int p = 0; p < PANELS; ++p) at[p] = panels[p].values + g * A.group_columns * LANES;
        constexpr int groups_a_chunk = CHUNK / A.group_columns;
        const float* x = columns + static_cast<size_t>(g / groups_a_chunk) * CHUNK * TOKENS +
                         g % groups_a_chunk * A.group_columns;
#pragma GCC unroll 4
        for (int k = 0; k < A.group_columns; ++k) {
            V w[PANELS];
            for (int p = 0; p < PANELS; ++p) w[p] = load(at[p] + k * LANES);
            for (int t = 0; t < TOKENS; ++t) {
                const V b = splat(x[t * CHUNK + k]);
                for (int p = 0; p < PANELS; ++p) s[t][p] = fma(w[p], b, s[t][p]);
            }
        }
        for (int p = 0; p < PANELS; ++p) {
            const V d = A.scaled ? load(panels[p].scales + g * LANES) : zero();
            const V m = A.minimum ? load(panels[p].minima + g * LANES) : zero();
            for (int t = 0; t < TOKENS; ++t) {
                V& sum = total[t][p];
                sum = A.scaled ? fma(d, s[t][p], sum) : add(sum, s[t][p]);
                if (A.minimum) sum = fma(m, splat(sums[g * TOKENS + t]), sum);
            }
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int p = 0; p < PANELS; ++p) store(y + (t * PANELS + p) * LANES, total[t][p]);
}

// The sizes of tiles that exist: a smaller number of tokens takes the next larger.
constexpr int tile_for(int tokens) {
    for (int n : {1, 2, 3, 4, 6, 8, 12})
        if (n >= tokens && n <= TILE_TOKENS) return n;
    return TILE_TOKENS;
}

// The same for weights that stream by.
constexpr int stream_for(int tokens) {
    for (int n : {1, 2, 4})
        if (n >= tokens && n <= STREAM_TOKENS) return n;
    return STREAM_TOKENS;
}

template <class Use>
inline void with_stream(int n, const Use& use) {
    if (n == 1) return use.template operator()<1>();
    if constexpr (STREAM_TOKENS >= 2)
        if (n == 2) return use.template operator()<2>();
    if constexpr (STREAM_TOKENS >= 4)
        if (n == 4) return use.template operator()<4>();
}

// Calls use.operator()<N>() for the tile size n.
template <class Use>
inline void with_tile(int n, const Use& use) {
    switch (n) {
        case 1:
            return use.template operator()<1>();
        case 2:
            return use.template operator()<2>();
        case 3:
            return use.template operator()<3>();
        case 4:
            return use.template operator()<4>();
    }
    if constexpr (TILE_TOKENS >= 6)
        if (n == 6) return use.template operator()<6>();
    if constexpr (TILE_TOKENS >= 12) {
        if (n == 8) return use.template operator()<8>();
        return use.template operator()<12>();
    }
}

// Panels [first, first + PANELS) against all tokens, a few at a time; their weights come from
// memory once.
template <Layout F, int PANELS>
inline void stream_panels(const Part& part, int first, const Prepared& x, const Target& target) {
    const int padded = part.padded_cols();
    for (int done = 0; done < target.tokens; done += STREAM_TOKENS) {
        const size_t before = static_cast<size_t>(done) * padded;
        const Prepared some{x.columns + before, x.sums + before / CHUNK * sum_groups<F>()};
        with_stream(stream_for(target.tokens - done), [&]<int TOKENS>() {
            // Few tokens need several panels' sums to hide a multiply-add; many have sums enough.
            constexpr int width = TOKENS > 1 && PANELS > 2 ? 2 : PANELS;
            const auto run = [&]<int N>(int panel) {
                V y[N][TOKENS];
                stream<F>(part.panel(panel), part.unit_stride(panel), part.units(), some, y);
                for (int p = 0; p < N; ++p)
                    for (int t = 0; t < TOKENS; ++t)
                        target.put(done + t, (panel + p) * LANES, y[p][t]);
            };
            int panel = first;
            for (; panel + width <= first + PANELS; panel += width)
                run.template operator()<width>(panel);
            if constexpr (PANELS % width != 0) run.template operator()<1>(panel);
        });
    }
}

template <Layout F>
inline void stream_part(const Part& part, const Weight* next, const Prepared& x,
                        const Target& target) {
    pool().run(part.blocks(), [&](int block) {
        prefetch_borders(part, next, block);
        int at = block * part.block_panels();
        const int stop = std::min(part.panels(), at + part.block_panels());
        while (at < stop) {
            const int n = std::min(STREAM_PANELS, stop - at);
            if constexpr (STREAM_PANELS >= 4)
                if (n == 4) stream_panels<F, 4>(part, at, x, target);
            if constexpr (STREAM_PANELS >= 3)
                if (n == 3) stream_panels<F, 3>(part, at, x, target);
            if constexpr (STREAM_PANELS >= 2)
                if (n == 2) stream_panels<F, 2>(part, at, x, target);
            if (n == 1) stream_panels<F, 1>(part, at, x, target);
            at += n;
        }
    });
}

// PANELS panels from `panel` on, decoded piece by piece, against tiles [first, stop) of the tokens.
template <Layout F, int PANELS>
inline void tile_panels(const Part& part, int panel, int first, int stop, const Prepared& x,
                        const Target& target) {
    constexpr int groups_a_chunk = F.groups, sums_a_chunk = sum_groups<F>();
    constexpr int piece = DECODED_COLUMNS / CHUNK;
    constexpr int scales = piece * groups_a_chunk * LANES, values = piece * CHUNK * LANES;
    constexpr int tile_floats = TILE_TOKENS * PANELS * LANES;
    constexpr size_t decoded_floats = PANELS * (values + 2 * scales);
    float* memory = task_scratch(decoded_floats + static_cast<size_t>(stop - first) * tile_floats);
    float* y = memory + decoded_floats;
    std::memset(y, 0, sizeof(float) * static_cast<size_t>(stop - first) * tile_floats);
    Decoded decoded[PANELS];
    for (int p = 0; p < PANELS; ++p) {
        float* at = memory + p * (values + 2 * scales);
        decoded[p] = {at, at + values, at + values + scales};
    }
    const int chunks = part.padded_cols() / CHUNK;
    for (int at = 0; at < chunks; at += piece) {
        const int n = std::min(piece, chunks - at);
        for (int p = 0; p < PANELS; ++p)
            decode_panel<F>(part.panel(panel + p), part.unit_stride(panel), at, n, decoded[p]);
        for (int i = first; i < stop; ++i) {
            const int tokens = std::min(TILE_TOKENS, target.tokens - i * TILE_TOKENS);
            const size_t before = static_cast<size_t>(i) * TILE_TOKENS * chunks;
            with_tile(tile_for(tokens), [&]<int N>() {
                tile<arithmetic<F>(), N>(
                    decoded, n * groups_a_chunk,
                    x.columns + before * CHUNK + static_cast<size_t>(at) * CHUNK * N,
                    static_cast<size_t>(TILE_TOKENS) * chunks * CHUNK,
                    x.sums + before * sums_a_chunk + static_cast<size_t>(at) * sums_a_chunk * N,
                    y + static_cast<size_t>(i - first) * tile_floats);
            });
        }
    }
    for (int i = first; i < stop; ++i)
        for (int t = 0; t < TILE_TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) {
                if (i * TILE_TOKENS + t >= target.tokens) break;
                const float* of = y + static_cast<size_t>(i - first) * tile_floats;
                target.put(i * TILE_TOKENS + t, (panel + p) * LANES,
                           load(of + (t * PANELS + p) * LANES));
            }
}

template <Layout F>
inline void tile_part(const Part& part, const Prepared& x, const Target& target) {
    const int panels = part.panels(), tiles = (target.tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    const int runs = (panels + TILE_PANELS - 1) / TILE_PANELS;
    // Few rows on many cores: the tokens are cut too, at the price of decoding more than once.
    const int slabs = std::clamp(4 * pool().threads() / runs, 1, tiles);
    pool().run(runs * slabs, [&](int task) {
        const int panel = task / slabs * TILE_PANELS, slab = task % slabs;
        const int first = tiles * slab / slabs, stop = tiles * (slab + 1) / slabs;
        if (panel + TILE_PANELS <= panels) {
            tile_panels<F, TILE_PANELS>(part, panel, first, stop, x, target);
        } else {
            for (int p = panel; p < panels; ++p) tile_panels<F, 1>(part, p, first, stop, x, target);
        }
    });
}

// Beyond so many tokens, decoding a panel once for all of them pays.
constexpr int MOST_STREAMED = 2 * STREAM_TOKENS;

template <Layout F>
inline Prepared prepare(const float* x, int tokens, int width, int padded,
                        Scratch<float>& scratch) {
    constexpr int groups = sum_groups<F>();
    const bool streams = tokens <= MOST_STREAMED;
    const int full = streams ? STREAM_TOKENS : TILE_TOKENS, tiles = (tokens + full - 1) / full;
    const size_t room = static_cast<size_t>(tiles) * full * padded;
    float* columns = scratch.at_least(room + room / CHUNK * groups + LANES);
    float* sums = columns + room;
    pool().run(tokens * padded > POINTWISE_ELEMENTS ? tiles : 1, [&](int task) {
        const int first = task, stop = tokens * padded > POINTWISE_ELEMENTS ? task + 1 : tiles;
        for (int i = first; i < stop; ++i) {
            const int left = std::min(full, tokens - i * full);
            const size_t before = static_cast<size_t>(i) * full * padded;
            prepare_tile<F>(x + static_cast<size_t>(i) * full * width, left, width, padded,
                            streams ? stream_for(left) : tile_for(left), columns + before,
                            sums + before / CHUNK * groups);
        }
    });
    return {columns, sums};
}

template <Layout F>
inline void matmul_in(const float* x, const Part& part, const Weight* next, const Target& target,
                      Scratch<float>& scratch) {
    const Prepared prepared = prepare<F>(x, target.tokens, part.cols, part.padded_cols(), scratch);
    if (target.tokens <= MOST_STREAMED) stream_part<F>(part, next, prepared, target);
    else tile_part<F>(part, prepared, target);
}

inline void matmul(const float* x, const Part& part, const Weight* next, const Output& out) {
    static thread_local Scratch<float> scratch;
    with_layout(static_cast<int>(part.layout.type),
                [&]<Layout F>() { matmul_in<F>(x, part, next, Target{out}, scratch); });
}

// weight = scale * q + minimum, with one rounding where there is a minimum.
template <Layout F>
inline void embed_row_in(const Part& part, int row, float* y) {
    const int chunks = part.padded_cols() / CHUNK, lane = row % LANES;
    float* values = task_scratch(static_cast<size_t>(chunks) * LANES * (CHUNK + 2 * F.groups));
    float* scales = values + static_cast<size_t>(chunks) * CHUNK * LANES;
    float* minima = scales + static_cast<size_t>(chunks) * F.groups * LANES;
    const int panel = row / LANES;
    decode_panel<F>(part.panel(panel), part.unit_stride(panel), 0, chunks,
                    {values, scales, minima});
    for (int k = 0; k < part.cols; ++k) {
        const int group = k / (CHUNK / F.groups) * LANES + lane;
        const float q = values[k * LANES + lane] * DOWNSCALE<F>.of[k % CHUNK] - F.offset;
        const float scaled = F.scale == 0 ? q : scales[group] * q;
        y[k] = F.has_minimum() ? std::fma(scales[group], q, minima[group]) : scaled;
    }
}

inline void embed_row(const Part& part, int row, float* y) {
    with_layout(static_cast<int>(part.layout.type),
                [&]<Layout F>() { embed_row_in<F>(part, row, y); });
}
