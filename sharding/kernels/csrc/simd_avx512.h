// Sixteen float32 lanes in one AVX-512 register. The same names in simd_avx2.h and simd_portable.h.
// Included inside the namespace of its instruction set, after <immintrin.h>.

constexpr const char* ISA_NAME = "avx512";
constexpr int TILE_TOKENS = 12;  // 12 x 2 sums fill 24 of 32 registers
constexpr int TILE_PANELS = 2;
constexpr int STREAM_PANELS = 4;  // at most; what registers hold
constexpr int STREAM_TOKENS = 4;
constexpr int REGISTERS = 32;  // that hold a V

struct V {
    __m512 v;
};
struct W {
    __m512i v;
};

inline V zero() { return {_mm512_setzero_ps()}; }
inline V splat(float a) { return {_mm512_set1_ps(a)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
inline void store_first(float* p, V a, int n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline V load_first(const float* p, int n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// NaN in `a` stays: the hardware's maximum returns its second operand then.
inline V max(V a, V b) { return {_mm512_max_ps(b.v, a.v)}; }
// Lanes below n from a, the others from b.
inline V first(V a, int n, V b) {
    return {_mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1), b.v, a.v)};
}
// Lanes 1 0 3 2 5 4 ...
inline V swap_pairs(V a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }

inline V load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_f16(uint16_t* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline V load_bf16(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline V load_i8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
inline W load_u8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

inline W load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline W mask(W a, uint32_t bits) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(bits)))};
}
inline W both(W a, W b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N>
inline W right(W a) {
    return {_mm512_srli_epi32(a.v, N)};
}
template <int N>
inline W left(W a) {
    return {_mm512_slli_epi32(a.v, N)};
}
inline V to_float(W a) { return {_mm512_cvtepi32_ps(a.v)}; }

// table[four bits of each lane from BIT on]
struct Table {
    __m512 v;
};
inline Table load_table(const float* p) { return {_mm512_loadu_ps(p)}; }
template <int BIT>
inline V lookup(const Table& table, W word) {
    return {_mm512_permutexvar_ps(right<BIT>(word).v, table.v)};
}

inline V round(V a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n; flushes to zero and to infinity as arithmetic does.
inline V scale_by_power(V a, V n) { return {_mm512_scalef_ps(a.v, n.v)}; }
