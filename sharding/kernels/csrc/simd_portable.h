// Sixteen float32 lanes as an array, for any processor: the compiler may vectorise the loops. A
// multiply-add rounds twice here (the file is compiled without contraction), so that a result does
// not depend on what the compiler found. See simd_avx512.h.

constexpr const char* ISA_NAME = "portable";
constexpr int TILE_TOKENS = 4;
constexpr int TILE_PANELS = 1;
constexpr int STREAM_PANELS = 1;
constexpr int STREAM_TOKENS = 1;
constexpr int REGISTERS = 8;

struct V {
    float v[16];
};
struct W {
    uint32_t v[16];
};

template <class F>
inline V each(F of) {
    V r;
    for (int i = 0; i < 16; ++i) r.v[i] = of(i);
    return r;
}
template <class F>
inline W each_word(F of) {
    W r;
    for (int i = 0; i < 16; ++i) r.v[i] = of(i);
    return r;
}

inline V splat(float a) {
    return each([=](int) { return a; });
}
inline V zero() { return splat(0.0f); }
inline V load(const float* p) {
    return each([=](int i) { return p[i]; });
}
inline void store_first(float* p, const V& a, int n) {
    std::memcpy(p, a.v, sizeof(float) * static_cast<size_t>(n));
}
inline void store(float* p, const V& a) { store_first(p, a, 16); }
inline V load_first(const float* p, int n) {
    return each([=](int i) { return i < n ? p[i] : 0.0f; });
}
inline V add(const V& a, const V& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline V sub(const V& a, const V& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline V mul(const V& a, const V& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline V div(const V& a, const V& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline V fma(const V& a, const V& b, const V& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline V max(const V& a, const V& b) {
    return each([&](int i) { return b.v[i] > a.v[i] ? b.v[i] : a.v[i]; });
}
inline V first(const V& a, int n, const V& b) {
    return each([&](int i) { return i < n ? a.v[i] : b.v[i]; });
}
inline V swap_pairs(const V& a) {
    return each([&](int i) { return a.v[i ^ 1]; });
}
inline float sum(const V& a) {
    float s[16];
    std::memcpy(s, a.v, sizeof s);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
}
inline float largest(const V& a) {
    float most = a.v[0];
    for (const float lane : a.v) most = lane > most ? lane : most;
    return most;
}

inline V load_f16(const uint16_t* p) {
    return each([=](int i) { return f16_to_f32(p[i]); });
}
inline void store_f16(uint16_t* p, const V& a) {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(a.v[i]);
}
inline V load_bf16(const uint16_t* p) {
    return each([=](int i) { return bits_to_f32(static_cast<uint32_t>(p[i]) << 16); });
}
inline V load_i8(const int8_t* p) {
    return each([=](int i) { return static_cast<float>(p[i]); });
}
inline W load_u8(const uint8_t* p) {
    return each_word([=](int i) { return static_cast<uint32_t>(p[i]); });
}

inline W load_words(const uint8_t* p) {
    W r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline W mask(const W& a, uint32_t bits) {
    return each_word([&](int i) { return a.v[i] & bits; });
}
inline W both(const W& a, const W& b) {
    return each_word([&](int i) { return a.v[i] | b.v[i]; });
}
template <int N>
inline W right(const W& a) {
    return each_word([&](int i) { return a.v[i] >> N; });
}
template <int N>
inline W left(const W& a) {
    return each_word([&](int i) { return a.v[i] << N; });
}
inline V to_float(const W& a) {
    return each([&](int i) { return static_cast<float>(static_cast<int32_t>(a.v[i])); });
}

struct Table {
    const float* v;
};
inline Table load_table(const float* p) { return {p}; }
template <int BIT>
inline V lookup(const Table& table, const W& word) {
    return each([&](int i) { return table.v[word.v[i] >> BIT & 15u]; });
}

inline V round(const V& a) {
    return each([&](int i) { return std::nearbyint(a.v[i]); });
}
inline V scale_by_power(const V& a, const V& n) {
    return each([&](int i) {
        const bool is_nan = n.v[i] != n.v[i];
        return std::ldexp(a.v[i], is_nan ? 0 : static_cast<int>(n.v[i]));
    });
}
