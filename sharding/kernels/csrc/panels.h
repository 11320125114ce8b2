// Where products of digits take values, scales and minima from, a chunk of PANELS panels at a time:
// from a weight as it is packed, or from panels that were opened. Included inside the namespace of
// an instruction set, after digits.h.

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

// As the weight is packed.
template <Layout F, int PANELS_>
struct PackedPanels {
    static constexpr int PANELS = PANELS_, CHUNKS = F.chunks, GROUPS = F.groups;
    static constexpr bool MINIMA = F.has_minimum(), PAIRED = false;

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
template <int PANELS_, int GROUPS_, bool MINIMA_, bool PAIRED_>
struct OpenPanels {
    static constexpr int PANELS = PANELS_, CHUNKS = 1, GROUPS = GROUPS_;
    static constexpr bool MINIMA = MINIMA_, PAIRED = PAIRED_;
    static constexpr int SCALES_AT = CHUNK * LANES, MINIMA_AT = SCALES_AT + GROUPS * LANES * 4;
    static constexpr int PAIRS_AT = MINIMA_AT + MINIMA * GROUPS * LANES * 4;
    static constexpr int BYTES = PAIRS_AT + PAIRED * GROUPS * LANES * 4;  // of a panel's chunk

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
    // What products of pairs have too much for a group's values, negative.
    inline __attribute__((always_inline)) __m512i pairs_of(int p, int group) const {
        return _mm512_load_si512(unit + p * BYTES + PAIRS_AT + group * LANES * 4);
    }
    inline __attribute__((always_inline)) V floats(int p, int at, int group) const {
        return load(reinterpret_cast<const float*>(unit + p * BYTES + at) + group * LANES);
    }
    void next_unit() { unit += PANELS * BYTES; }
};

template <Layout F, int PANELS, bool PAIRED>
using OpenPanelsOf = OpenPanels<PANELS, F.groups, F.has_minimum(), PAIRED>;

// See OpenPanels::pairs_of; from a group's steps.
template <Layout F>
inline __m512i pairs_of_values(const uint8_t* steps) {
    const __m512i most = _mm512_set1_epi8(top(F)), half = _mm512_set1_epi8(room(F));
    __m512i products = _mm512_setzero_si512(), odds = products;
    for (int s = 0; s < STEPS / F.groups; s += 2) {
        const __m512i even = _mm512_load_si512(steps + s * 64);
        const __m512i odd = _mm512_load_si512(steps + s * 64 + 64);
        products = _mm512_dpbusd_epi32(products, _mm512_add_epi8(odd, most), even);
        odds = _mm512_dpbusd_epi32(odds, odd, half);
    }
    return _mm512_sub_epi32(odds, products);
}

// Writes panels as `OpenPanels` reads them.
template <Layout F, int PANELS, bool PAIRED>
__attribute__((noinline)) void open(PackedPanels<F, PANELS> from, int units, uint8_t* to) {
    using Open = OpenPanelsOf<F, PANELS, PAIRED>;
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
                    if constexpr (PAIRED)
                        _mm512_store_si512(
                            to + Open::PAIRS_AT + g * LANES * 4,
                            pairs_of_values<F>(to + g * STEPS / F.groups * LANES * STEP));
                }
            }
        }
    }
}
