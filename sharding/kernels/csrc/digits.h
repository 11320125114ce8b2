// Activations as digits: fixed-point numbers of 24 bits, a chunk of 32 columns and a token at a
// time. Included inside the namespace of an instruction set, after target.h.
//
// x = s X with s a power of two and X = 65536 X2 + 256 X1 + X0, each digit from -128 to 127. The
// bound, and what 24 bits cost against float32 activations (a last bit or two, more for columns far
// smaller than their chunk's largest), is in docs/numerics.md.
//
// A sum of digits does not start at 0 but at the bits of the float 1.5 * 2^23 times what a unit of
// it is worth: as a float it then is that anchor plus s 256^j Aj, exactly, while |Aj| < 2^22. So
// sums become floats, put together and scaled, by additions alone, which do not wait for the units
// that multiply.

constexpr int STEPS = CHUNK / STEP;
constexpr int DIGITS = 3;
constexpr int TILE = 4;  // tokens; with 2 panels and 3 digits 24 sums of 32 registers
constexpr float ANCHOR = 1.5f * (1 << 23);
static_assert(CHUNK * 128 * 128 < 1 << 22, "a sum of digits would leave its anchor");
// Sums are kept times 2^-RAISE until they are done: the highest anchor would overflow.
constexpr int RAISE = 20;

// Products of many tokens may take columns in pairs (products.h): the top digit of one is then
// added to the stored value of the other, and a byte must hold their sum. So top digits stay so far
// below 128, however many tokens there are: half as many as there are values; 0 where those fill a
// byte.
constexpr int room(const Layout& f) { return bias(f) == 128 ? 0 : 1 << (f.bits - 1); }
constexpr int top(const Layout& f) { return 127 - room(f); }

// Activations as digits, tiles of N tokens, with s times 2^-RAISE:
//
//     digits   [chunk][step][N] words X0 X1 X2 0 of the step's 4 columns; for pairs, X2 + top in
//              even steps and X2 - room in odd ones
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
template <Layout F>
inline Fixing fixing(V a, V b) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const uint32_t largest = _mm512_reduce_max_epu32(
        _mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a.v), magnitude),
                         _mm512_and_si512(_mm512_castps_si512(b.v), magnitude)));
    if (largest >= 0x7f800000u) return {0.0f, bits_to_f32(0x7fc00000u)};
    // X reaches top * 65536 + 0x7f7f: beyond it, the next power. So large that the inverse is a
    // normal number.
    constexpr uint32_t beyond = 0xffffff - 2 * (top(F) * 65536 + 0x7f7f);
    const uint32_t exponent = std::max((largest + beyond) >> 23, 23u + RAISE);
    return {bits_to_f32((276 - exponent) << 23), bits_to_f32((exponent - 22 - RAISE) << 23)};
}

// Eight steps' digits, as pairs want them.
template <Layout F>
inline __m512i for_pairs(__m512i digits) {
    constexpr int more = top(F) * 0x01010101;
    constexpr int less = static_cast<int>((256u - room(F)) * 0x01010101u);
    const __m512i by =
        _mm512_setr_epi32(0, 0, more, 0, 0, 0, less, 0, 0, 0, more, 0, 0, 0, less, 0);
    return _mm512_add_epi8(digits, by);
}

// Adds to word 3 of `sums` what products of pairs have too much for their digits.
inline __m512i add_pairs(__m512i sums, __m512i digits) {
    const __m512i even = _mm512_setr_epi32(0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0);
    const __m512i odd = _mm512_setr_epi32(0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 14, 0, 0, 0, 0);
    return _mm512_dpbusd_epi32(sums, _mm512_maskz_permutexvar_epi32(0x0808, even, digits),
                               _mm512_maskz_permutexvar_epi32(0x0808, odd, digits));
}

template <Layout F, bool PAIRED>
inline void prepare_chunk(const float* x, int tile, int32_t* digits, int32_t* sums,
                          float* anchors) {
    const V a = load(x), b = load(x + 16);
    const Fixing fix = fixing<F>(a, b);
    __m512i low = _mm512_setzero_si512(), high = low;
    if (fix.up != 0.0f) {
        low = digits_of(a, splat(fix.up));
        high = digits_of(b, splat(fix.up));
    }
    const __m512i none = _mm512_setzero_si512(), ones = _mm512_set1_epi8(1);
    __m512i low_sums = _mm512_dpbusd_epi32(none, ones, low),
            high_sums = _mm512_dpbusd_epi32(none, ones, high);
    if constexpr (PAIRED) {
        low = for_pairs<F>(low);
        high = for_pairs<F>(high);
        low_sums = add_pairs(low_sums, low);
        high_sums = add_pairs(high_sums, high);
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
    const auto put_sums = [&](int32_t* to, __m512i of) {
        alignas(16) int32_t word[4];
        _mm_store_si128(reinterpret_cast<__m128i*>(word), quarters(of));
        const int32_t total = word[2] * 65536 + word[1] * 256 + word[0];
        for (int d = 0; d < DIGITS; ++d)
            to[d] = static_cast<int32_t>(f32_to_bits(anchors[d])) - bias(F) * word[d];
        to[DIGITS - 1] -= word[3];
        const float x_sum = static_cast<float>(total) * fix.down;
        std::memcpy(to + DIGITS, &x_sum, sizeof x_sum);
    };
    if constexpr (F.groups == 1) {
        put_sums(sums, _mm512_add_epi32(low_sums, high_sums));
    } else {
        put_sums(sums, low_sums);
        put_sums(sums + 4 * tile, high_sums);
    }
}

// The sizes of tiles that exist: three tokens take four.
constexpr int tile_for(int tokens) { return tokens >= 3 ? 4 : tokens; }

template <Layout F, bool PAIRED>
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
                    prepare_chunk<F, PAIRED>(
                        row + c * CHUNK, tile,
                        digits + before * STEPS * 4 + (c * STEPS * tile + t) * 4,
                        sums + (before * F.groups + c * F.groups * tile + t) * 4,
                        anchors + (before + c * tile + t) * DIGITS);
            }
        }
    });
    return {digits, sums, anchors};
}
