// y = residual + x @ weight^T on quantised weights in Order::Bytes, in integers. Included inside
// the namespace of an instruction set, after target.h.
//
// Activations become fixed-point numbers of 24 bits, a chunk of 32 columns and a token at a time: x
// = s X with s a power of two and X = 65536 X2 + 256 X1 + X0, each digit from -128 to 127. Sums of
// stored values times digits are exact in 32 bits, in any order, and a product of bytes adds up
// four columns of 16 rows at once. Per group: v = 65536 A2 + (256 A1 + A0), y += scale * (s v),
// y += minimum * (sum of s X), group after group; then the residual. The bound, and what 24 bits
// cost against float32 activations (nothing, but for columns far smaller than their chunk's
// largest), is in docs/numerics.md.
//
// A sum of digits does not start at 0 but at the bits of the float 1.5 * 2^23 times what a unit of
// it is worth: as a float it then is that anchor plus s 256^j Aj, exactly, while |Aj| < 2^22. So
// sums become floats, put together and scaled, by additions alone, which do not wait for the units
// that multiply.
//
// All numbers of tokens take the same way, and the same bits come of it: a few decode values as
// they stream from memory, three instructions a step at most; many have panels opened first, once
// for all of them (OpenPanels).

constexpr int STEPS = CHUNK / STEP;
constexpr int DIGITS = 3;
constexpr int TILE = 4;  // tokens; with 2 panels and 3 digits 24 sums of 32 registers
constexpr float ANCHOR = 1.5f * (1 << 23);
static_assert(CHUNK * 128 * 128 < 1 << 22, "a sum of digits would leave its anchor");
// Sums are kept times 2^-RAISE until they are done: the highest anchor would overflow.
constexpr int RAISE = 20;

// Activations as digits, tiles of N tokens, with s times 2^-RAISE:
//
//     digits   [chunk][step][N] words X0 X1 X2 0 of the step's 4 columns
//     sums     [group][N] words: what the three sums start at, and s times the sum of X
//     anchors  [chunk][N] three floats
struct Prepared {
    const int32_t *digits, *sums;
    const float* anchors;

    // From one chunk to the next, in words.
    static constexpr int stride(int tokens) { return STEPS * 4 * tokens; }
};

// Words 0 to 3 of the four quarters, added up.
inline __m128i quarters(__m512i a) {
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// 16 numbers as words X0 X1 X2 0 of each four.
inline __m512i digits_of(V x, V scale) {
    const __m512i transpose = _mm512_maskz_broadcast_i32x4(
        0xffff, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i bias = _mm512_set1_epi32(0x808080);
    const __m512i fixed = _mm512_cvtps_epi32(mul(x, scale).v);
    // Carries make each byte its digit plus 128; the fourth stays zero, X has 24 bits.
    const __m512i balanced = _mm512_xor_si512(_mm512_add_epi32(fixed, bias), bias);
    return _mm512_shuffle_epi8(_mm512_and_si512(balanced, _mm512_set1_epi32(0xffffff)), transpose);
}

// The power of two that makes the largest of a chunk fill 24 bits, and its inverse times 2^-RAISE;
// 0 and NaN where a number is not finite.
struct Fixing {
    float up, down;
};
inline Fixing fixing(V a, V b) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const uint32_t largest = _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a.v), magnitude),
                         _mm512_and_si512(_mm512_castps_si512(b.v), magnitude)));
    if (largest >= 0x7f800000u) return {0.0f, bits_to_f32(0x7fc00000u)};
    // Digits reach 0x7f7f7f: beyond it, 1.992 times a power of two, the next power. So large that
    // the inverse is a normal number.
    const uint32_t exponent = std::max((largest + 0x10101u) >> 23, 23u + RAISE);
    return {bits_to_f32((276 - exponent) << 23), bits_to_f32((exponent - 22 - RAISE) << 23)};
}

template <Layout F>
inline void prepare_chunk(const float* x, int tile, int32_t* digits, int32_t* sums,
                          float* anchors) {
    const V a = load(x), b = load(x + 16);
    const Fixing fix = fixing(a, b);
    __m512i low = _mm512_setzero_si512(), high = low;
    if (fix.up != 0.0f) {
        low = digits_of(a, splat(fix.up));
        high = digits_of(b, splat(fix.up));
    }
    for (int d = 0; d < DIGITS; ++d)
        anchors[d] = ANCHOR * static_cast<float>(1 << 8 * d) * fix.down;
    const auto put = [&](int step, __m128i word) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + step * 4 * tile), word);
    };
    put(0, _mm512_castsi512_si128(low));
    put(1, _mm512_extracti32x4_epi32(low, 1));
    put(2, _mm512_extracti32x4_epi32(low, 2));
    put(3, _mm512_extracti32x4_epi32(low, 3));
    put(4, _mm512_castsi512_si128(high));
    put(5, _mm512_extracti32x4_epi32(high, 1));
    put(6, _mm512_extracti32x4_epi32(high, 2));
    put(7, _mm512_extracti32x4_epi32(high, 3));
    const __m512i ones = _mm512_set1_epi8(1);
    const auto put_sums = [&](int32_t* to, __m512i of) {
        alignas(16) int32_t word[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(word), quarters(of));
        const int32_t total = word[2] * 65536 + word[1] * 256 + word[0];
        for (int d = 0; d < DIGITS; ++d)
            to[d] = static_cast<int32_t>(f32_to_bits(anchors[d])) - bias(F) * word[d];
        const float x_sum = static_cast<float>(total) * fix.down;
        std::memcpy(to + DIGITS, &x_sum, sizeof x_sum);
    };
    const __m512i none = _mm512_setzero_si512();
    if constexpr (F.groups == 1) {
        put_sums(sums, _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, ones, low), ones, high));
    } else {
        put_sums(sums, _mm512_dpbusd_epi32(none, ones, low));
        put_sums(sums + 4 * tile, _mm512_dpbusd_epi32(none, ones, high));
    }
}

// The values of step S of a chunk, a byte each, with the format's bias.
template <Layout F, int S>
inline __m512i step(const uint8_t* chunk, __m512i table) {
    constexpr Planes p = planes(F);
    const auto plane = [&](int at) { return _mm512_loadu_si512(chunk + at * 64); };
    if constexpr (p.low == 8) {
        return plane(S);
    } else {
        constexpr int steps = 8 / p.low, at = S % steps * p.low;
        const __m512i field = _mm512_set1_epi8((1 << p.low) - 1);
        const __m512i shifted = _mm512_srli_epi16(plane(S / steps), at);
        const __m512i low = _mm512_and_si512(at ? shifted : plane(S / steps), field);
        if constexpr (is_nonlinear(F)) {
            return _mm512_shuffle_epi8(table, low);
        } else if constexpr (p.high == 0) {
            return low;
        } else {
            constexpr int more = 8 / p.high, from = S % more * p.high;
            const __m512i word = plane(p.low + S / more);
            const __m512i upper = from > p.low   ? _mm512_srli_epi16(word, from - p.low)
                                  : from < p.low ? _mm512_slli_epi16(word, p.low - from)
                                                 : word;
            const __m512i bits = _mm512_set1_epi8(static_cast<char>(((1 << p.high) - 1) << p.low));
            return _mm512_ternarylogic_epi32(low, upper, bits, 0xf8);  // low | (upper & bits)
        }
    }
}

// NONLINEAR, biased, in every quarter.
inline __m512i load_byte_table() {
    uint8_t bytes[64];
    for (int i = 0; i < 64; ++i)
        bytes[i] = static_cast<uint8_t>(static_cast<int>(NONLINEAR[i % 16]) + 128);
    return _mm512_loadu_si512(bytes);
}

// Where `stream` takes values, scales and minima of PANELS panels from, chunk by chunk: here from
// the weight as it is packed.
template <Layout F, int PANELS_>
struct PackedPanels {
    static constexpr int PANELS = PANELS_, CHUNKS = F.chunks, GROUPS = F.groups;
    static constexpr bool MINIMA = F.has_minimum();

    const uint8_t* unit;
    size_t unit_stride;
    bool cold;  // it comes from memory
    __m512i table = load_byte_table();

    inline __attribute__((always_inline)) void begin(int c) const {
        if (cold) prefetch_share<F, PANELS>(unit, c);
    }
    template <int S>
    inline __attribute__((always_inline)) __m512i values(int p, int c) const {
        return step<F, S>(unit + p * F.unit_bytes() + c * F.chunk_bytes(), table);
    }
    inline __attribute__((always_inline)) V scale_of(int p, int group) const {
        return scale<F>(unit + p * F.unit_bytes(), group);
    }
    inline __attribute__((always_inline)) V minimum_of(int p, int group) const {
        return minimum<F>(unit + p * F.unit_bytes(), group);
    }
    void next_unit() { unit += unit_stride; }
};

// The same, opened: values take a byte each, scales and minima are float32. A few tiles of tokens
// pay for that, as 512-bit instructions of any kind share two units on Intel's processors: decoding
// and scaling were a third of all that a tile of Q6_K did there.
template <int PANELS_, int GROUPS_, bool MINIMA_>
struct OpenPanels {
    static constexpr int PANELS = PANELS_, CHUNKS = 1, GROUPS = GROUPS_;
    static constexpr bool MINIMA = MINIMA_;
    static constexpr int SCALES_AT = CHUNK * LANES, MINIMA_AT = SCALES_AT + GROUPS * LANES * 4;
    static constexpr int BYTES = MINIMA_AT + MINIMA * GROUPS * LANES * 4;  // of a panel's chunk

    const uint8_t* unit;

    void begin(int) const {}
    template <int S>
    inline __attribute__((always_inline)) __m512i values(int p, int) const {
        return _mm512_load_si512(unit + p * BYTES + S * 64);
    }
    inline __attribute__((always_inline)) V scale_of(int p, int group) const {
        return floats(p, SCALES_AT, group);
    }
    inline __attribute__((always_inline)) V minimum_of(int p, int group) const {
        return floats(p, MINIMA_AT, group);
    }
    inline __attribute__((always_inline)) V floats(int p, int at, int group) const {
        return load(reinterpret_cast<const float*>(unit + p * BYTES + at) + group * LANES);
    }
    void next_unit() { unit += PANELS * BYTES; }
};

template <Layout F, int PANELS>
using OpenPanelsOf = OpenPanels<PANELS, F.groups, F.has_minimum()>;

// Writes panels as `OpenPanels` reads them.
template <Layout F, int PANELS>
__attribute__((noinline)) void open(PackedPanels<F, PANELS> from, int units, uint8_t* to) {
    using Open = OpenPanelsOf<F, PANELS>;
    for (int u = 0; u < units; ++u, from.next_unit()) {
        for (int c = 0; c < F.chunks; ++c) {
            from.begin(c);
            for (int p = 0; p < PANELS; ++p, to += Open::BYTES) {
                unrolled<0, STEPS>([&]<int S>() __attribute__((always_inline)) {
                    _mm512_store_si512(to + S * 64, from.template values<S>(p, c));
                });
                const auto put = [&](int at, int g, V value) {
                    store(reinterpret_cast<float*>(to + at) + g * LANES, value);
                };
                for (int g = 0; g < F.groups; ++g) {
                    put(Open::SCALES_AT, g, from.scale_of(p, c * F.groups + g));
                    if constexpr (Open::MINIMA)
                        put(Open::MINIMA_AT, g, from.minimum_of(p, c * F.groups + g));
                }
            }
        }
    }
}

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
                            close_group(w, c * GROUPS + G, a[t], sums + t * 4,
                                        anchors + t * DIGITS, y[t]);
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

constexpr int tile_for(int tokens) { return tokens >= 3 ? 4 : tokens; }

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
            case 1: stream<1>(w, units, some, target, token, row); break;
            case 2: stream<2>(w, units, some, target, token, row); break;
            default: stream<TILE>(w, units, some, target, token, row);
        }
    }
};

template <Layout F>
inline Prepared prepare(const float* x, const Part& part, int tokens, Scratch<int32_t>& scratch) {
    const int chunks = part.padded_cols() / CHUNK, tiles = (tokens + TILE - 1) / TILE;
    const size_t rows = static_cast<size_t>(tiles) * TILE * chunks;
    int32_t* digits = scratch.at_least(rows * (STEPS * 4 + F.groups * 4 + DIGITS));
    int32_t* sums = digits + rows * STEPS * 4;
    float* anchors = reinterpret_cast<float*>(sums + rows * F.groups * 4);
    const bool shared = tokens * part.cols > POINTWISE_ELEMENTS;
    pool().run(shared ? tiles : 1, [&](int task) {
        for (int i = task; i < (shared ? task + 1 : tiles); ++i) {
            const int left = std::min(TILE, tokens - i * TILE), tile = tile_for(left);
            const size_t before = static_cast<size_t>(i) * TILE * chunks;
            for (int t = 0; t < tile; ++t) {
                // Tokens that fill up a tile are copies of the last.
                const float* row =
                    x + (static_cast<size_t>(i) * TILE + std::min(t, left - 1)) * part.cols;
                for (int c = 0; c < chunks; ++c)
                    prepare_chunk<F>(row + c * CHUNK, tile,
                                     digits + before * STEPS * 4 + (c * STEPS * tile + t) * 4,
                                     sums + (before * F.groups + c * F.groups * tile + t) * 4,
                                     anchors + (before + c * tile + t) * DIGITS);
            }
        }
    });
    return {digits, sums, anchors};
}

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
        const Meeting<F> some{part, first, std::min(blocks, first + at_once), tiles * slab / slabs,
                              tiles * (slab + 1) / slabs, prepared, target};
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
