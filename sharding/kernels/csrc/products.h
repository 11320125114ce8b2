// y = residual + x @ weight^T on quantised weights in Order::Bytes, in integers. Included inside
// the namespace of an instruction set, after digits.h and panels.h.
//
// Sums of stored values times digits are exact in 32 bits, in any order, and a product of bytes
// adds up four columns of 16 rows at once. Per group: v = 65536 A2 + (256 A1 + A0), y += scale * (s
// v), y += minimum * (sum of s X), group after group; then the residual. Bound: docs/numerics.md.
//
// All numbers of tokens take the same way, and the same bits come of it: a few decode values as
// they stream from memory, three instructions a step at most; many have panels opened first, once
// for all of them (OpenPanels).

// One token's finished group: sums of digits become floats and meet the group's scale and minimum.
template <class Panels>
inline __attribute__((always_inline)) void close_group(const Panels& w, int group,
                                                       const __m512i (&a)[Panels::PANELS][DIGITS],
                                                       const int32_t* sums, const float* anchors,
                                                       V (&y)[Panels::PANELS]) {
    for (int p = 0; p < Panels::PANELS; ++p) {
        const auto value = [&](int d) {
            return sub({_mm512_castsi512_ps(a[p][d])}, splat(anchors[d]));
        };
        const V v = add(value(2), add(value(1), value(0)));
        y[p] = fma(w.scale_of(p, group), v, y[p]);
        if constexpr (Panels::MINIMA) {
            float x_sum;
            std::memcpy(&x_sum, sums + DIGITS, sizeof x_sum);
            y[p] = fma(w.minimum_of(p, group), splat(x_sum), y[p]);
        }
    }
}

// The sums of panels x TOKENS over all columns.
template <int TOKENS, class Panels>
__attribute__((noinline)) void stream(Panels w, int units, const Prepared& x, const Target& target,
                                      int token, int row) {
    constexpr int PANELS = Panels::PANELS, GROUPS = Panels::GROUPS, steps = STEPS / GROUPS;
    V y[TOKENS][PANELS];
    for (int t = 0; t < TOKENS; ++t)
        for (int p = 0; p < PANELS; ++p) y[t][p] = zero();
    const int32_t *digits = x.digits, *sums = x.sums;
    const float* anchors = x.anchors;
    for (int u = 0; u < units; ++u, w.next_unit()) {
        for (int c = 0; c < Panels::CHUNKS; ++c) {
            w.begin(c);
            unrolled<0, GROUPS>([&]<int G>() __attribute__((always_inline)) {
                __m512i a[TOKENS][PANELS][DIGITS];
                for (int t = 0; t < TOKENS; ++t)
                    for (int p = 0; p < PANELS; ++p)
                        for (int d = 0; d < DIGITS; ++d)
                            a[t][p][d] = _mm512_set1_epi32(sums[t * 4 + d]);
                unrolled<G * steps, steps>([&]<int S>() __attribute__((always_inline)) {
                    __m512i v[PANELS];
                    for (int p = 0; p < PANELS; ++p) v[p] = w.template values<S>(p, c);
                    for (int t = 0; t < TOKENS; ++t) {
                        for (int d = 0; d < DIGITS; ++d) {
                            const __m512i digit =
                                _mm512_set1_epi32(digits[(S * TOKENS + t) * 4 + d]);
                            for (int p = 0; p < PANELS; ++p)
                                a[t][p][d] = _mm512_dpbusd_epi32(a[t][p][d], v[p], digit);
                        }
                        // Not after the other tokens' last products but between them: additions
                        // and products run side by side, and a processor does not look far ahead.
                        if constexpr (S == G * steps + steps - 1)
                            close_group(w, c * GROUPS + G, a[t], sums + t * 4, anchors + t * DIGITS,
                                        y[t]);
                    }
                });
                sums += 4 * TOKENS;
            });
            digits += Prepared::stride(TOKENS);
            anchors += DIGITS * TOKENS;
        }
    }
    // Unrolled, so that no sum has an address: then none is stored twice in the loop.
    unrolled<0, PANELS * TOKENS>([&]<int I>() __attribute__((always_inline)) {
        constexpr int p = I / TOKENS, t = I % TOKENS;
        target.put(token + t, row + p * LANES, mul(y[t][p], splat(1 << RAISE)));
    });
}

// Tiles of tokens from which opening panels pays.
constexpr int OPEN_TILES = 8;
// Most bytes of opened panels at a time: half of a small second-level cache.
constexpr int OPEN_BYTES = 1 << 19;

// Blocks of panels [first, last) of a part against tiles [begin, end) of tokens.
template <Layout F>
struct Meeting {
    const Part& part;
    int first, last, begin, end;
    const Prepared& x;
    const Target& target;

    bool opens() const { return end - begin >= OPEN_TILES; }

    // Packed blocks, one after the other: the weights are what comes from memory.
    void packed() const {
        for (int block = first; block < last; ++block)
            with_panels(block, [&]<int PANELS>(int panel) {
                auto w = panels<PANELS>(panel);
                for (int i = begin; i < end; ++i, w.cold = false) tile(i, panel, w, part.units());
            });
    }

    // Opened blocks, all for each tile: the digits of many tokens are more than a cache holds.
    void opened() const {
        static thread_local Scratch<uint8_t> scratch;
        const int chunks = part.padded_cols() / CHUNK;
        const size_t bytes = static_cast<size_t>(chunks) * 2 * OpenPanelsOf<F, 2>::BYTES;
        uint8_t* to = scratch.at_least(bytes * (last - first));
        for (int block = first; block < last; ++block)
            with_panels(block, [&]<int PANELS>(int panel) {
                open(panels<PANELS>(panel), part.units(), to + bytes * (block - first));
            });
        for (int i = begin; i < end; ++i)
            for (int block = first; block < last; ++block)
                with_panels(block, [&]<int PANELS>(int panel) {
                    tile(i, panel, OpenPanelsOf<F, PANELS>{to + bytes * (block - first)}, chunks);
                });
    }

  private:
    // Calls use.operator()<PANELS>(first panel): the last block of a part may have one panel less.
    template <class Use>
    void with_panels(int block, const Use& use) const {
        const int panel = block * part.block_panels();
        if (panel + 1 < part.panels()) use.template operator()<2>(panel);
        else use.template operator()<1>(panel);
    }

    template <int PANELS>
    PackedPanels<F, PANELS> panels(int panel) const {
        return {part.panel(panel), part.unit_stride(panel), true};
    }

    template <class Panels>
    void tile(int i, int panel, const Panels& w, int units) const {
        const size_t before = static_cast<size_t>(i) * TILE * (part.padded_cols() / CHUNK);
        const Prepared some{x.digits + before * STEPS * 4, x.sums + before * F.groups * 4,
                            x.anchors + before * DIGITS};
        const int token = i * TILE, row = panel * LANES;
        switch (tile_for(std::min(TILE, target.tokens - token))) {
            case 1:
                stream<1>(w, units, some, target, token, row);
                break;
            case 2:
                stream<2>(w, units, some, target, token, row);
                break;
            default:
                stream<TILE>(w, units, some, target, token, row);
        }
    }
};

template <Layout F>
inline void matmul_in(const float* x, const Part& part, const Weight* next, const Target& target,
                      Scratch<int32_t>& scratch) {
    const Prepared prepared = prepare<F>(x, part, target.tokens, scratch);
    const int tiles = (target.tokens + TILE - 1) / TILE, blocks = part.blocks();
    const int wanted = 4 * pool().threads();  // tasks, so that no thread waits for long
    // Few rows on many cores: the tokens are cut too.
    const int slabs = tiles == 1 ? 1 : std::clamp(wanted / blocks, 1, tiles);
    const int block_bytes = part.padded_cols() / CHUNK * 2 * OpenPanelsOf<F, 2>::BYTES;
    const int at_once = tiles / slabs < OPEN_TILES
                            ? 1
                            : std::clamp(blocks / wanted, 1, std::max(1, OPEN_BYTES / block_bytes));
    const int runs = (blocks + at_once - 1) / at_once;
    pool().run(runs * slabs, [&](int task) {
        const int slab = task % slabs, first = task / slabs * at_once;
        const Meeting<F> some{part,
                              first,
                              std::min(blocks, first + at_once),
                              tiles * slab / slabs,
                              tiles * (slab + 1) / slabs,
                              prepared,
                              target};
        if (some.opens()) return some.opened();
        if (tiles == 1) prefetch_borders(part, next, first);
        some.packed();
    });
}

inline void matmul(const float* x, const Part& part, const Weight* next, const Output& out) {
    static thread_local Scratch<int32_t> scratch;
    with_layout(static_cast<int>(part.layout.type), [&]<Layout F>() {
        if constexpr (is_quantised(F)) matmul_in<F>(x, part, next, Target{out}, scratch);
        else AVX512_OPS.matmul(x, part, next, out);
    });
}

// The stored value k of a chunk in one lane.
template <Layout F>
inline int stored(const uint8_t* chunk, int k, int lane) {
    constexpr Planes p = planes(F);
    const auto bits = [&](int plane_at, int width) {
        const int step = k / STEP, steps = 8 / width;
        const uint8_t byte = chunk[(plane_at + step / steps) * 64 + lane * 4 + k % STEP];
        return byte >> (step % steps * width) & ((1 << width) - 1);
    };
    int value = bits(0, p.low);
    if constexpr (p.high != 0) value |= bits(p.low, p.high) << p.low;
    return is_nonlinear(F) ? static_cast<int>(NONLINEAR[value]) : value - bias(F);
}

// weight = scale * q + minimum, with one rounding where there is a minimum.
template <Layout F>
inline void embed_row_in(const Part& part, int row, float* y) {
    const int lane = row % LANES, panel = row / LANES;
    for (int c = 0; c < part.padded_cols() / CHUNK; ++c) {
        const uint8_t* unit =
            part.panel(panel) + static_cast<size_t>(c / F.chunks) * part.unit_stride(panel);
        const uint8_t* chunk = unit + c % F.chunks * F.chunk_bytes();
        for (int g = 0; g < F.groups; ++g) {
            float scales[LANES], minima[LANES] = {};
            store(scales, scale<F>(unit, c % F.chunks * F.groups + g));
            if constexpr (F.has_minimum())
                store(minima, minimum<F>(unit, c % F.chunks * F.groups + g));
            constexpr int columns = CHUNK / F.groups;
            for (int k = g * columns; k < (g + 1) * columns; ++k) {
                const auto q = static_cast<float>(stored<F>(chunk, k, lane));
                y[c * CHUNK + k] =
                    F.has_minimum() ? std::fma(scales[lane], q, minima[lane]) : scales[lane] * q;
            }
        }
    }
}

inline void embed_row(const Part& part, int row, float* y) {
    with_layout(static_cast<int>(part.layout.type), [&]<Layout F>() {
        if constexpr (is_quantised(F)) embed_row_in<F>(part, row, y);
        else AVX512_OPS.embed_row(part, row, y);
    });
}
