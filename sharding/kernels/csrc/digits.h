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
    int32_t *digits, *sums;
    float* anchors;

    // From one chunk to the next, in words.
    static constexpr int stride(int tokens) { return STEPS * 4 * tokens; }
    // From tile i on.
    template <Layout F>
    Prepared tile(int i, int chunks) const {
        const size_t before = static_cast<size_t>(i) * TILE * chunks;
        return {digits + before * STEPS * 4, sums + before * F.groups * 4,
                anchors + before * DIGITS};
    }
};

// Quarter i of output j is quarter j of input i.
inline void transpose(const __m512i (&in)[4], __m512i* out) {
    const __m512i a = _mm512_shuffle_i32x4(in[0], in[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(in[2], in[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(in[0], in[1], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(in[2], in[3], 0xee);
    out[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    out[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    out[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    out[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// 16 numbers X; zeros if the scale is.
inline __m512i fixed_of(V x, V scale) {
    const __m512i bits = _mm512_castps_si512(scale.v);
    return _mm512_maskz_cvtps_epi32(_mm512_test_epi32_mask(bits, bits), mul(x, scale).v);
}

// Bytes X0 X1 X2 of each X.
inline __m512i balanced(__m512i fixed) {
    // Carries make each byte its digit plus 128.
    const __m512i bias = _mm512_set1_epi32(0x808080);
    return _mm512_xor_si512(_mm512_add_epi32(fixed, bias), bias);
}

// 16 numbers as words X0 X1 X2 0 of each four; zeros if the scale is.
inline __m512i digits_of(V x, V scale) {
    const __m512i turn = _mm512_maskz_broadcast_i32x4(
        0xffff, _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1));
    return _mm512_shuffle_epi8(balanced(fixed_of(x, scale)), turn);
}

// In each quarter, the sum of 16 integers of one of four.
inline __m512i sums_of_four(const __m512i (&of)[4]) {
    __m512i part[4];
    transpose(of, part);
    const __m512i half =
        _mm512_add_epi32(_mm512_add_epi32(part[0], part[1]), _mm512_add_epi32(part[2], part[3]));
    const __m512i two = _mm512_add_epi32(half, _mm512_shuffle_epi32(half, _MM_PERM_BADC));
    return _mm512_add_epi32(two, _mm512_shuffle_epi32(two, _MM_PERM_CDAB));
}

inline __m512i larger(__m512i a, __m512i b) { return _mm512_max_epu32(a, b); }

// Bits of the larger of two numbers, without their signs, lane by lane.
inline __m512i magnitude(V a, V b) {
    const __m512i most = _mm512_set1_epi32(0x7fffffff);
    return larger(_mm512_and_si512(_mm512_castps_si512(a.v), most),
                  _mm512_and_si512(_mm512_castps_si512(b.v), most));
}

// The powers of two that make the largest of each of four chunks fill 24 bits, and their inverses
// times 2^-RAISE, a chunk in each quarter; 0 and NaN where a number is not finite.
struct Fixing {
    __m512i up, down;

    V up_of(int chunk) const {
        const __m512i lane = _mm512_set1_epi32(4 * chunk);
        return {_mm512_castsi512_ps(_mm512_permutexvar_epi32(lane, up))};
    }
};
template <Layout F>
inline Fixing fixing(const __m512i (&magnitudes)[4]) {
    __m512i part[4];
    transpose(magnitudes, part);
    __m512i most = larger(larger(part[0], part[1]), larger(part[2], part[3]));
    most = larger(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
    most = larger(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
    // X reaches top * 65536 + 0x7f7f: beyond it, the next power. So large that the inverse is a
    // normal number.
    constexpr int beyond = 0xffffff - 2 * (top(F) * 65536 + 0x7f7f);
    const __m512i exponent =
        larger(_mm512_srli_epi32(_mm512_add_epi32(most, _mm512_set1_epi32(beyond)), 23),
               _mm512_set1_epi32(23 + RAISE));
    const __mmask16 finite = _mm512_cmplt_epu32_mask(most, _mm512_set1_epi32(0x7f800000));
    const __m512i up = _mm512_sub_epi32(_mm512_set1_epi32(276), exponent);
    const __m512i down = _mm512_sub_epi32(exponent, _mm512_set1_epi32(22 + RAISE));
    return {_mm512_maskz_slli_epi32(finite, up, 23),
            _mm512_mask_slli_epi32(_mm512_set1_epi32(0x7fc00000), finite, down, 23)};
}

// A quarter of each register: a chunk's lanes X0 X1 X2 0.
inline __m512i each_quarter(int a, int b, int c, int d) {
    return _mm512_setr_epi32(a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d);
}

// What sums of a group's steps start at, and what they come to: see Prepared. Makes pairs of the
// steps, where they are wanted.
template <Layout F, bool PAIRED>
inline __m512i group_sums(__m512i* steps, const Fixing& fix, V anchors) {
    constexpr int n = STEPS / F.groups;
    __m512i words = _mm512_setzero_si512();
    for (int s = 0; s < n; ++s) words = _mm512_dpbusd_epi32(words, _mm512_set1_epi8(1), steps[s]);
    __m512i start = _mm512_castps_si512(anchors.v);
    if constexpr (bias(F) != 0)
        start = _mm512_sub_epi32(start, _mm512_mullo_epi32(words, _mm512_set1_epi32(bias(F))));
    if constexpr (PAIRED) {
        const __m512i more = each_quarter(0, 0, top(F) * 0x01010101, 0);
        const __m512i less = each_quarter(0, 0, room(F) * 0x01010101, 0);
        __m512i products = _mm512_setzero_si512();
        for (int s = 0; s < n; s += 2) {
            steps[s] = _mm512_add_epi8(steps[s], more);
            steps[s + 1] = _mm512_sub_epi8(steps[s + 1], less);
            products = _mm512_dpbusd_epi32(products, steps[s], steps[s + 1]);
        }
        start = _mm512_mask_sub_epi32(start, 0x4444, start, products);
    }
    __m512i total = _mm512_sllv_epi32(words, each_quarter(0, 8, 16, 0));
    total = _mm512_add_epi32(total, _mm512_shuffle_epi32(total, _MM_PERM_BADC));
    total = _mm512_add_epi32(total, _mm512_shuffle_epi32(total, _MM_PERM_CDAB));
    const V x_sum = mul({_mm512_cvtepi32_ps(total)}, {_mm512_castsi512_ps(fix.down)});
    return _mm512_mask_blend_epi32(0x8888, start, _mm512_castps_si512(x_sum.v));
}

// Writes `n` runs of N quarters, `apart` words from one another.
template <int N>
inline void put_quarters(__m512i from, int n, int apart, int32_t* to) {
    if constexpr (N == 4) return _mm512_storeu_si512(to, from);
    constexpr int lanes = 4 * N;
    for (int i = 0; i < n; ++i) {
        const auto run = static_cast<__mmask16>(((1u << lanes) - 1) << i * lanes);
        _mm512_mask_storeu_epi32(to + i * (apart - lanes), run, from);
    }
}

// Where activations come from: rows of them, or of gates and then ups, whose gated product they
// are.
struct Activations {
    const float* x;
    int tokens, cols;
    bool gated;

    const float* at(int token, int column) const {
        return x + static_cast<size_t>(token) * cols * (gated ? 2 : 1) + column;
    }
    Activations from(int token) const { return {at(token, 0), tokens - token, cols, gated}; }
    template <bool GATED>
    V load_at(const float* of) const {
        if constexpr (GATED) return mul(silu(load(of)), load(of + cols));
        else return load(of);
    }
};

// Digits of the first N tokens in 4 / N chunks from chunk c on; chunk after chunk, token after
// token. Tokens that fill up a tile are copies of the last; chunks beyond the last are not stored.
template <Layout F, bool PAIRED, bool GATED, int N>
inline void prepare_some(const Activations& rows, int c, const Prepared& to) {
    const int last = rows.cols / CHUNK - 1, chunks = std::min(4 / N, last + 1 - c);
    V x[4][2];
    __m512i magnitudes[4], low[4], high[4], steps[STEPS];
    for (int i = 0; i < 4; ++i) {
        const int token = std::min(i % N, rows.tokens - 1), chunk = std::min(c + i / N, last);
        const float* of = rows.at(token, chunk * CHUNK);
        x[i][0] = rows.load_at<GATED>(of);
        x[i][1] = rows.load_at<GATED>(of + LANES);
        magnitudes[i] = magnitude(x[i][0], x[i][1]);
    }
    const Fixing fix = fixing<F>(magnitudes);
    for (int i = 0; i < 4; ++i) {
        low[i] = digits_of(x[i][0], fix.up_of(i));
        high[i] = digits_of(x[i][1], fix.up_of(i));
    }
    transpose(low, steps);
    transpose(high, steps + 4);
    const float one = ANCHOR, more = 256 * one, most = 65536 * one;
    const V units{_mm512_setr_ps(one, more, most, 0, one, more, most, 0, one, more, most, 0, one,
                                 more, most, 0)};
    const V starts = mul(units, {_mm512_castsi512_ps(fix.down)});
    store_first(to.anchors + c * N * DIGITS, {_mm512_maskz_compress_ps(0x7777, starts.v)},
                DIGITS * N * chunks);
    for (int g = 0; g < F.groups; ++g)
        put_quarters<N>(group_sums<F, PAIRED>(steps + g * STEPS / F.groups, fix, starts), chunks,
                        F.groups * N * 4, to.sums + (c * F.groups + g) * N * 4);
    for (int s = 0; s < STEPS; ++s)
        put_quarters<N>(steps[s], chunks, Prepared::stride(N),
                        to.digits + c * Prepared::stride(N) + s * N * 4);
}

// The sizes of tiles that exist: three tokens take four, and so does what is left of many.
constexpr int tile_for(int tokens, bool paired) { return paired || tokens >= 3 ? 4 : tokens; }

template <Layout F, bool PAIRED, int N>
inline void prepare_tile(const Activations& rows, const Prepared& to) {
    for (int c = 0; c < rows.cols / CHUNK; c += 4 / N) {
        if (rows.gated) prepare_some<F, PAIRED, true, N>(rows, c, to);
        else prepare_some<F, PAIRED, false, N>(rows, c, to);
    }
}

template <Layout F, bool PAIRED>
inline Prepared prepare(const Activations& all, Scratch<int32_t>& scratch) {
    const int chunks = all.cols / CHUNK, tiles = (all.tokens + TILE - 1) / TILE;
    const size_t rows = static_cast<size_t>(tiles) * TILE * chunks;
    int32_t* digits = scratch.at_least(rows * (STEPS * 4 + F.groups * 4 + DIGITS));
    int32_t* sums = digits + rows * STEPS * 4;
    const Prepared out{digits, sums, reinterpret_cast<float*>(sums + rows * F.groups * 4)};
    const bool shared = all.tokens * all.cols > POINTWISE_ELEMENTS;
    pool().run(shared ? tiles : 1, [&](int task) {
        for (int i = task; i < (shared ? task + 1 : tiles); ++i) {
            const Activations some = all.from(i * TILE);
            const Prepared to = out.tile<F>(i, chunks);
            switch (tile_for(some.tokens, PAIRED)) {
                case 1:
                    prepare_tile<F, false, 1>(some, to);
                    break;
                case 2:
                    prepare_tile<F, false, 2>(some, to);
                    break;
                default:
                    prepare_tile<F, PAIRED, 4>(some, to);
            }
        }
    });
    return out;
}
