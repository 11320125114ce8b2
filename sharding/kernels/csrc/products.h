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
//
// Paired, two columns take one product of their top digits instead of two (Winograd, A New
// Algorithm for Inner Product, IEEE Transactions on Computers C-17, 1968). With a and w of even
// steps, a' and w' of odd ones,
//
//     a w + a' w' = (a + top + w') (a' - room + w) - (a + top) (a' - room)
//                   - ((top + w') w - room w')
//
// of which the second term is one of the activations alone, the third of the weights. It is exact,
// so no bit depends on it. Where additions have units of their own (AMD's) a group of 32 columns
// takes 22 cycles for 16 outputs instead of 26; where they share those of products (Intel's) it is
// slower.

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

// Adds N steps' products of one token: its digits lie TOKENS words apart. Two steps are a pair.
template <int TOKENS, int N, int PANELS>
inline __attribute__((always_inline)) void multiply(const __m512i (&v)[N][PANELS],
                                                    const int32_t* digits,
                                                    __m512i (&a)[PANELS][DIGITS]) {
    constexpr bool paired = N == 2;
    const auto digit = [&](int i, int d) { return _mm512_set1_epi32(digits[i * TOKENS * 4 + d]); };
    for (int i = 0; i < N; ++i)
        for (int d = 0; d < DIGITS - paired; ++d) {
            const __m512i x = digit(i, d);
            for (int p = 0; p < PANELS; ++p) a[p][d] = _mm512_dpbusd_epi32(a[p][d], v[i][p], x);
        }
    if constexpr (paired) {
        const __m512i even = digit(0, DIGITS - 1), odd = digit(1, DIGITS - 1);
        for (int p = 0; p < PANELS; ++p)
            a[p][DIGITS - 1] = _mm512_dpbusd_epi32(a[p][DIGITS - 1], _mm512_add_epi8(even, v[1][p]),
                                                   _mm512_add_epi8(odd, v[0][p]));
    }
}

// The sums of panels x TOKENS over all columns.
template <int TOKENS, class Panels>
__attribute__((noinline)) void stream(Panels w, int units, const Prepared& x, const Target& target,
                                      int token, int row) {
    constexpr int PANELS = Panels::PANELS, GROUPS = Panels::GROUPS, steps = STEPS / GROUPS;
    constexpr int at_once = Panels::PAIRED ? 2 : 1;
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
                    for (int p = 0; p < PANELS; ++p) {
                        for (int d = 0; d < DIGITS; ++d)
                            a[t][p][d] = _mm512_set1_epi32(sums[t * 4 + d]);
                        if constexpr (Panels::PAIRED)
                            a[t][p][DIGITS - 1] =
                                _mm512_add_epi32(a[t][p][DIGITS - 1], w.pairs_of(p, G));
                    }
                unrolled<0, steps / at_once>([&]<int I>() __attribute__((always_inline)) {
                    constexpr int S = G * steps + I * at_once;
                    __m512i v[at_once][PANELS];
                    for (int p = 0; p < PANELS; ++p) {
                        v[0][p] = w.template values<S>(p, c);
                        if constexpr (Panels::PAIRED) v[1][p] = w.template values<S + 1>(p, c);
                    }
                    for (int t = 0; t < TOKENS; ++t) {
                        multiply<TOKENS>(v, digits + (S * TOKENS + t) * 4, a[t]);
                        // Not after the other tokens' last products but between them: additions
                        // and products run side by side, and a processor does not look far ahead.
                        if constexpr (I == steps / at_once - 1)
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

// Tokens of a slab from which opening panels pays.
constexpr int OPEN_TOKENS = 32;
// Most bytes of opened panels at a time: a quarter of a second-level cache, half of a small one.
constexpr int OPEN_BYTES = 1 << 18;
// Tokens from which a thread takes some of them rather than some of the rows: it then finds their
// digits in its own cache.
constexpr int SLAB_TOKENS = 128;

// How a product is cut into tasks: slabs of tokens' tiles, each against runs of blocks of panels.
struct Cut {
    int tile, tiles, slabs, at_once, runs;

    Cut(int tokens, int tile, int blocks, int opened_bytes) : tile(tile) {
        const int threads = pool().threads();
        const int wanted = 4 * threads;  // so that nobody waits for long
        tiles = (tokens + tile - 1) / tile;
        slabs = std::clamp(tokens / SLAB_TOKENS, 1, threads);
        // Few rows on many cores.
        if (tiles > 1) slabs = std::max(slabs, std::min(wanted / blocks, tiles));
        at_once = 1;
        if (opens()) {
            const int most = std::max(1, OPEN_BYTES / opened_bytes);
            at_once = std::clamp(blocks * slabs / wanted, 1, most);
        }
        runs = (blocks + at_once - 1) / at_once;
    }

    bool opens() const { return tiles / slabs >= OPEN_TOKENS / tile; }
    int first_tile(int slab) const { return tiles * slab / slabs; }
};

// Blocks of panels [first, last) of a part against tiles [begin, end) of tokens.
template <Layout F, bool PAIRED>
struct Meeting {
    const Part& part;
    int first, last, begin, end;
    const Prepared& x;
    const Target& target;

    static int opened_bytes(const Part& part) {
        return part.padded_cols() / CHUNK * 2 * OpenPanelsOf<F, 2, PAIRED>::BYTES;
    }

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
        const size_t bytes = opened_bytes(part);
        uint8_t* to = scratch.at_least(bytes * (last - first));
        for (int block = first; block < last; ++block)
            with_panels(block, [&]<int PANELS>(int panel) {
                open<F, PANELS, PAIRED>(panels<PANELS>(panel), part.units(),
                                        to + bytes * (block - first));
            });
        for (int i = begin; i < end; ++i)
            for (int block = first; block < last; ++block)
                with_panels(block, [&]<int PANELS>(int panel) {
                    tile(i, panel, OpenPanelsOf<F, PANELS, PAIRED>{to + bytes * (block - first)},
                         chunks);
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
        const Prepared some = x.tile<F>(i, part.padded_cols() / CHUNK);
        const int token = i * TILE, row = panel * LANES;
        if constexpr (!PAIRED) {
            switch (tile_for(std::min(TILE, target.tokens - token), PAIRED)) {
                case 1:
                    return stream<1>(w, units, some, target, token, row);
                case 2:
                    return stream<2>(w, units, some, target, token, row);
            }
        }
        stream<TILE>(w, units, some, target, token, row);
    }
};

template <Layout F, bool PAIRED>
inline void matmul_in(const Activations& x, const Part& part, const Weight* next,
                      const Target& target, const Cut& cut, Scratch<int32_t>& scratch) {
    const Prepared prepared = prepare<F, PAIRED>(x, scratch);
    // A slab's tasks follow one another: they are one thread's.
    pool().run(cut.runs * cut.slabs, [&](int task) {
        const int slab = task / cut.runs, first = task % cut.runs * cut.at_once;
        const Meeting<F, PAIRED> some{part,
                                      first,
                                      std::min(part.blocks(), first + cut.at_once),
                                      cut.first_tile(slab),
                                      cut.first_tile(slab + 1),
                                      prepared,
                                      target};
        if (cut.opens()) return some.opened();
        if (cut.tiles == 1) prefetch_borders(part, next, first);
        if constexpr (!PAIRED) some.packed();
    });
}

inline void matmul_of(const Activations& x, const Part& part, const Weight* next,
                      const Output& out) {
    static thread_local Scratch<int32_t> scratch;
    with_layout(static_cast<int>(part.layout.type), [&]<Layout F>() {
        if constexpr (is_quantised(F)) {
            const Cut cut(out.tokens, TILE, part.blocks(), Meeting<F, false>::opened_bytes(part));
            if constexpr (room(F) != 0)
                if (cut.opens() && pairs_columns())
                    return matmul_in<F, true>(x, part, next, Target{out}, cut, scratch);
            matmul_in<F, false>(x, part, next, Target{out}, cut, scratch);
        }
    });
}

inline void matmul(const float* x, const Part& part, const Weight* next, const Output& out) {
    if (!is_quantised(part.layout)) return AVX512_OPS.matmul(x, part, next, out);
    matmul_of({x, out.tokens, part.cols, false}, part, next, out);
}

inline void gated_matmul(const float* x, const Part& part, const Weight* next, const Output& out) {
    matmul_of({x, out.tokens, part.cols, true}, part, next, out);
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
