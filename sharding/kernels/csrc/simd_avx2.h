// Sixteen float32 lanes in two AVX2 registers; needs FMA and F16C too. See simd_avx512.h.

constexpr const char* ISA_NAME = "avx2";
constexpr int TILE_TOKENS = 6;  // 6 x 1 x 2 registers of 16
constexpr int TILE_PANELS = 1;
constexpr int STREAM_PANELS = 2;
constexpr int STREAM_TOKENS = 2;
constexpr int REGISTERS = 8;

struct V {
    __m256 lo, hi;
};
struct W {
    __m256i lo, hi;
};

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_first(float* p, V a, int n) {
    float lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, sizeof(float) * static_cast<size_t>(n));
}
inline V load_first(const float* p, int n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, sizeof(float) * static_cast<size_t>(n));
    return load(lanes);
}
inline V add(V a, V b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V fma(V a, V b, V c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline V max(V a, V b) { return {_mm256_max_ps(b.lo, a.lo), _mm256_max_ps(b.hi, a.hi)}; }
inline V first(V a, int n, V b) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
    const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes));
    return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}
inline V swap_pairs(V a) { return {_mm256_permute_ps(a.lo, 0xb1), _mm256_permute_ps(a.hi, 0xb1)}; }
inline float sum(V a) {
    const __m256 eight = _mm256_add_ps(a.lo, a.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float largest(V a) {
    const __m256 eight = _mm256_max_ps(a.lo, a.hi);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline V load_f16(const uint16_t* p) {
    const auto* half = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(half)), _mm256_cvtph_ps(_mm_loadu_si128(half + 1))};
}
inline void store_f16(uint16_t* p, V a) {
    auto* half = reinterpret_cast<__m128i*>(p);
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(half, _mm256_cvtps_ph(a.lo, nearest));
    _mm_storeu_si128(half + 1, _mm256_cvtps_ph(a.hi, nearest));
}
inline V load_bf16(const uint16_t* p) {
    const auto* half = reinterpret_cast<const __m128i*>(p);
    const auto widen = [](__m128i h) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    };
    return {widen(_mm_loadu_si128(half)), widen(_mm_loadu_si128(half + 1))};
}
inline V load_i8(const int8_t* p) {
    const auto widen = [](const int8_t* eight) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight));
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    };
    return {widen(p), widen(p + 8)};
}
inline W load_u8(const uint8_t* p) {
    const auto widen = [](const uint8_t* eight) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
    };
    return {widen(p), widen(p + 8)};
}

inline W load_words(const uint8_t* p) {
    const auto* words = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
}
inline W mask(W a, uint32_t bits) {
    const __m256i m = _mm256_set1_epi32(static_cast<int>(bits));
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline W both(W a, W b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
template <int N>
inline W right(W a) {
    return {_mm256_srli_epi32(a.lo, N), _mm256_srli_epi32(a.hi, N)};
}
template <int N>
inline W left(W a) {
    return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
inline V to_float(W a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// table[four bits of each lane from BIT on]; entries are whole and fit a byte, so that one shuffle
// finds those of four values.
struct Table {
    __m256i bytes;
};
inline Table load_table(const float* p) {
    alignas(16) int8_t bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<int8_t>(p[i]);
    const __m128i half = _mm_load_si128(reinterpret_cast<const __m128i*>(bytes));
    return {_mm256_broadcastsi128_si256(half)};
}
template <int BIT>
inline V lookup(const Table& table, W word) {
    const auto eight = [&](__m256i at) {
        const __m256i one = BIT % 8 ? _mm256_srli_epi32(at, 4) : at;
        const __m256i four =
            _mm256_shuffle_epi8(table.bytes, _mm256_and_si256(one, _mm256_set1_epi8(15)));
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(four, 24 - BIT / 8 * 8), 24));
    };
    return {eight(word.lo), eight(word.hi)};
}

inline V round(V a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
// In two steps, since one exponent field does not hold every power that a result may need.
inline V scale_by_power(V a, V n) {
    const auto power = [](__m256i e) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    const auto scaled = [&](__m256 value, __m256 by) {
        const __m256i e = _mm256_cvtps_epi32(by);
        const __m256i half = _mm256_srai_epi32(e, 1);
        return _mm256_mul_ps(_mm256_mul_ps(value, power(half)), power(_mm256_sub_epi32(e, half)));
    };
    return {scaled(a.lo, n.lo), scaled(a.hi, n.hi)};
}
