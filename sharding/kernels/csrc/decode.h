// Reading packed weights: a value of 16 rows at a time, and the scales of a group.
// Included inside the namespace of an instruction set.

// A value that lies in the middle of a word is not shifted down: masked where it lies it is q *
// 2^bit, and the activation it meets is multiplied by 2^-bit beforehand, both exactly. One
// instruction in eight saved where reading weights is what a token costs. Conversion is signed, so
// the topmost field is shifted down by its own width.
constexpr bool touches_sign(const Layout& f, int k) {
    const Place p = place(f.bits, k);
    return !p.spare && p.bit + f.bits == 32;
}

// log2 of what value() has too much.
constexpr int excess(const Layout& f, int k) {
    if (!is_packed(f) || is_nonlinear(f)) return 0;
    const Place p = place(f.bits, k);
    return p.spare ? 0 : touches_sign(f, k) ? p.bit - f.bits : p.bit;
}

struct Downscale {
    float of[CHUNK];
};
template <Layout F>
constexpr Downscale downscale() {
    Downscale d{};
    for (int k = 0; k < CHUNK; ++k) {
        d.of[k] = 1.0f;
        for (int i = 0; i < excess(F, k); ++i) d.of[k] *= 0.5f;
    }
    return d;
}
template <Layout F>
inline constexpr Downscale DOWNSCALE = downscale<F>();

template <Layout F>
inline W word(const uint8_t* chunk, int w) {
    return load_words(chunk + w * LANES * 4);
}

// The last two values of a chunk, put together from spare bits.
template <Layout F, int K>
inline W spare_value(const uint8_t* chunk) {
    constexpr bool last = K == CHUNK - 1;
    if constexpr (F.bits == 3) {
        const W low = right<30>(word<F>(chunk, last ? 2 : 0)), middle = word<F>(chunk, 1);
        return both(low, mask(last ? right<29>(middle) : right<28>(middle), 4));
    } else if constexpr (F.bits == 5) {
        constexpr int at = last ? 3 : 0;
        const W low = right<30>(word<F>(chunk, at)), middle = word<F>(chunk, 2);
        const W upper = mask(right<28>(word<F>(chunk, at + 1)), 12);
        return both(both(low, upper), mask(last ? right<27>(middle) : right<26>(middle), 16));
    } else {
        static_assert(F.bits == 6);
        constexpr int at = last ? 3 : 0;
        const W low = right<30>(word<F>(chunk, at));
        const W middle = mask(right<28>(word<F>(chunk, at + 1)), 12);
        return both(both(low, middle), mask(right<26>(word<F>(chunk, at + 2)), 48));
    }
}

// Value K of a chunk in all 16 rows, times 2^excess(F, K).
template <Layout F, int K>
inline V value(const uint8_t* chunk, const Table& table) {
    if constexpr (F.type == Type::F32) {
        return load(reinterpret_cast<const float*>(chunk) + K * LANES);
    } else if constexpr (F.type == Type::F16) {
        return load_f16(reinterpret_cast<const uint16_t*>(chunk) + K * LANES);
    } else if constexpr (F.type == Type::BF16) {
        return load_bf16(reinterpret_cast<const uint16_t*>(chunk) + K * LANES);
    } else if constexpr (F.type == Type::Q8_0) {
        return load_i8(reinterpret_cast<const int8_t*>(chunk) + K * LANES);
    } else {
        constexpr Place p = place(F.bits, K);
        constexpr uint32_t bits = (1u << F.bits) - 1;
        if constexpr (is_nonlinear(F)) {
            return lookup<p.bit>(table, word<F>(chunk, p.word));
        } else if constexpr (p.spare) {
            return to_float(spare_value<F, K>(chunk));
        } else if constexpr (touches_sign(F, K)) {
            return to_float(mask(right<F.bits>(word<F>(chunk, p.word)), bits << (p.bit - F.bits)));
        } else {
            return to_float(mask(word<F>(chunk, p.word), bits << p.bit));
        }
    }
}

inline const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

// Scale of group g of a unit, by row. d times a small integer is exact.
template <Layout F>
inline V scale(const uint8_t* unit, int g) {
    const uint8_t* at = unit + F.scales_at() + g * F.scale * LANES;
    if constexpr (!F.shared_d()) {
        return load_f16(halves(at));
    } else {
        const V d = load_f16(halves(unit + F.d_at()));
        if constexpr (F.type == Type::Q2_K) return mul(d, to_float(mask(load_u8(at), 15)));
        else if constexpr (F.has_minimum()) return mul(d, to_float(load_u8(at)));
        else return mul(d, load_i8(reinterpret_cast<const int8_t*>(at)));
    }
}

// What group g of a unit adds to every weight, by row.
template <Layout F>
inline V minimum(const uint8_t* unit, int g) {
    static_assert(F.has_minimum());
    const uint8_t* at = unit + F.minima_at() + g * F.minimum * LANES;
    if constexpr (!F.shared_d()) {
        return load_f16(halves(at));
    } else {
        const V d = load_f16(halves(unit + F.d_at()) + LANES);
        if constexpr (F.type == Type::Q2_K)
            return mul(d, to_float(right<4>(load_u8(unit + F.scales_at() + g * LANES))));
        else return mul(d, to_float(load_u8(at)));
    }
}

// Calls use.operator()<K>() for K = FIRST .. FIRST + N - 1, unrolled.
template <int FIRST, int N, class Use>
inline __attribute__((always_inline)) void unrolled(const Use& use) {
    [&]<int... K>(std::integer_sequence<int, K...>) __attribute__((always_inline)) {
        (use.template operator()<FIRST + K>(), ...);
    }(std::make_integer_sequence<int, N>());
}
