// y = residual + x @ weight^T of many tokens on tiles (Intel's AMX): 16 tokens meet 16 rows in one
// instruction, 64 products of bytes for each pair. For values of 4 bits alone. Included inside the
// namespace of an instruction set, after products.h.
//
// The integers are those of products.h, so the bits are too. A tile has room for 64 columns where a
// group has 32: next to a group's values lie the same times 16, and what they meet has two digits
// to the base 16 side by side. So two tiles hold all 24 bits, X = 4096 U + L, where three digits to
// the base 256 would take three. The sum of the two lower digits of products.h is never rounded for
// these values (32 * 15 * 32896 < 2^24), nor is anything here before U and L are put together.
//
// A tile of sums begins as zeros that are loaded: clearing it would make the next product wait for
// the last one's end. It is stored between the next group's products and read one group later.

constexpr int TOKENS_A_TILE = 16, CUTS = 2;
constexpr int SUMS = TOKENS_A_TILE * LANES;  // of a tile
constexpr int TILE_BYTES = 1024;             // 16 rows of 64
// Chunks that are taken at a time for all opened panels: their activations stay in a first-level
// cache.
constexpr int CHUNKS_AT_ONCE = 8;

// A row of a tile that begins.
alignas(64) constexpr int32_t NO_SUMS[LANES] = {};

// The formats that are computed so.
constexpr bool is_tiled(const Layout& f) { return f.bits == 4 && !is_nonlinear(f); }

// How a chunk lies in memory. Of 16 tokens: their U and L as digits [2][16 tokens][2][32], their
// powers of two and sums, 16 float32 each. Of a panel: values [2][8 steps][16 rows][4], then scales
// and minima.
constexpr int POWERS_AT = CUTS * TILE_BYTES, X_SUMS_AT = POWERS_AT + 64, X_BYTES = X_SUMS_AT + 64;
constexpr int W_SCALES_AT = TILE_BYTES, W_MINIMA_AT = W_SCALES_AT + 64, W_BYTES = W_MINIMA_AT + 64;

// Tile R of the eight; its rows lie `stride` bytes apart. Instructions by hand: compilers of 2020
// do not know them, and those that do believe that they leave memory alone.
template <int R>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t stride = 64) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(R) : "memory");
}
template <int R>
inline __attribute__((always_inline)) void store_tile(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t{64}), "i"(R) : "memory");
}
// Adds activations A times weights B to sums C.
template <bool SIGNED, int C, int A, int B>
inline __attribute__((always_inline)) void multiply_tile() {
    if constexpr (SIGNED)
        asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    else asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// All tiles are 16 rows of 64 bytes while this lives.
class Tiles {
  public:
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        static_assert(sizeof shapes == 64);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Half h of a chunk's columns of a token, as its digits in U and L: from -128 to 127, then from -8
// to 7.
inline void put_digits(__m512i x, int token, int h, uint8_t* chunk) {
    const auto lowest = [](__m512i v, int bits) {
        const __m512i half = _mm512_set1_epi32(1 << (bits - 1));
        const __m512i all = _mm512_set1_epi32((1 << bits) - 1);
        return _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(v, half), all), half);
    };
    const auto rest = [](__m512i v, __m512i lowest, int bits) {
        return _mm512_srai_epi32(_mm512_sub_epi32(v, lowest), bits);
    };
    const auto put = [&](int cut, int i, __m512i digit) {
        uint8_t* to = chunk + cut * TILE_BYTES + token * 64 + i * CHUNK + h * LANES;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(digit));
    };
    for (int cut = 1; cut >= 0; --cut) {
        const __m512i low = lowest(x, 4), both = rest(x, low, 4);
        const __m512i high = cut ? lowest(both, 8) : both;
        put(cut, 1, low);
        put(cut, 0, high);
        x = rest(both, high, 8);
    }
}

// The first lane of each quarter.
inline void put_four(V quarters, uint8_t* to) {
    _mm_storeu_ps(reinterpret_cast<float*>(to),
                  _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, quarters.v)));
}

// Chunk c of four tokens of 16, from `token` on. Beyond the last token are copies of it.
template <Layout F, bool GATED>
inline void prepare_four(const Activations& rows, int token, int c, uint8_t* chunk) {
    V x[4][2];
    __m512i magnitudes[4], words[4];
    for (int i = 0; i < 4; ++i) {
        const float* of = rows.at(std::min(token + i, rows.tokens - 1), c * CHUNK);
        for (int h = 0; h < 2; ++h) x[i][h] = rows.load_at<GATED>(of + h * LANES);
        magnitudes[i] = magnitude(x[i][0], x[i][1]);
    }
    const Fixing fix = fixing<F>(magnitudes);
    for (int i = 0; i < 4; ++i) {
        words[i] = _mm512_setzero_si512();
        for (int h = 0; h < 2; ++h) {
            const __m512i fixed = fixed_of(x[i][h], fix.up_of(i));
            put_digits(fixed, token + i, h, chunk);
            words[i] = _mm512_add_epi32(words[i], fixed);
        }
    }
    const V down{_mm512_castsi512_ps(fix.down)};
    put_four(down, chunk + POWERS_AT + token * 4);
    put_four(mul({_mm512_cvtepi32_ps(sums_of_four(words))}, down), chunk + X_SUMS_AT + token * 4);
}

// Activations of all tokens: [16 tokens][chunk].
template <Layout F>
inline const uint8_t* prepare_tiles(const Activations& all, Scratch<uint8_t>& scratch) {
    const int tiles = (all.tokens + TOKENS_A_TILE - 1) / TOKENS_A_TILE, chunks = all.cols / CHUNK;
    uint8_t* to = scratch.at_least(static_cast<size_t>(tiles) * chunks * X_BYTES);
    pool().run(tiles, [&](int i) {
        const Activations some = all.from(i * TOKENS_A_TILE);
        uint8_t* chunk = to + static_cast<size_t>(i) * chunks * X_BYTES;
        for (int c = 0; c < chunks; ++c, chunk += X_BYTES)
            for (int token = 0; token < TOKENS_A_TILE; token += 4) {
                if (some.gated) prepare_four<F, true>(some, token, c, chunk);
                else prepare_four<F, false>(some, token, c, chunk);
            }
    });
    return to;
}

// Writes panels one after the other, chunk after chunk. Values without an offset are unsigned.
template <Layout F, int PANELS>
__attribute__((noinline)) void open_tiles(PackedPanels<F, PANELS> from, int units, uint8_t* to) {
    const size_t panel_bytes = static_cast<size_t>(units) * F.chunks * W_BYTES;
    for (int u = 0; u < units; ++u, from.next_unit())
        for (int c = 0; c < F.chunks; ++c, to += W_BYTES) {
            from.begin(c);
            for (int p = 0; p < PANELS; ++p) {
                uint8_t* chunk = to + p * panel_bytes;
                unrolled<0, STEPS>([&]<int S>() __attribute__((always_inline)) {
                    const __m512i v =
                        _mm512_sub_epi8(from.template values<S>(p, c), _mm512_set1_epi8(bias(F)));
                    const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
                    _mm512_store_si512(chunk + S * 64,
                                       _mm512_and_si512(_mm512_slli_epi16(v, 4), upper));
                    _mm512_store_si512(chunk + (STEPS + S) * 64, v);
                });
                const auto put = [&](int at, V value) {
                    store(reinterpret_cast<float*>(chunk + at), value);
                };
                put(W_SCALES_AT, from.scale_of(p, c));
                if constexpr (F.has_minimum()) put(W_MINIMA_AT, from.minimum_of(p, c));
            }
        }
}

// The sums of a chunk's tiles become floats and meet its scale and minimum.
template <bool MINIMA>
inline __attribute__((always_inline)) void close_tiles(const uint8_t* x, const uint8_t* w,
                                                       const int32_t (&sums)[CUTS][SUMS],
                                                       V (&y)[TOKENS_A_TILE]) {
    const auto* powers = reinterpret_cast<const float*>(x + POWERS_AT);
    const auto* x_sums = reinterpret_cast<const float*>(x + X_SUMS_AT);
    const V scale = load(reinterpret_cast<const float*>(w + W_SCALES_AT));
    V minimum = zero();
    if constexpr (MINIMA) minimum = load(reinterpret_cast<const float*>(w + W_MINIMA_AT));
    unrolled<0, TOKENS_A_TILE>([&]<int I>() __attribute__((always_inline)) {
        const auto sum = [&](int cut) {
            return V{_mm512_cvtepi32_ps(_mm512_load_si512(sums[cut] + I * LANES))};
        };
        const V v = mul(fma(sum(0), splat(4096), sum(1)), splat(powers[I]));
        y[I] = fma(scale, v, y[I]);
        if constexpr (MINIMA) y[I] = fma(minimum, splat(x_sums[I]), y[I]);
    });
}

// y[16 tokens][16 rows] += the products of so many chunks, one after the other.
template <bool SIGNED>
__attribute__((noinline)) void stream_tiles(const uint8_t* x, const uint8_t* w, int chunks,
                                            float* to) {
    alignas(64) int32_t sums[2][CUTS][SUMS];
    V y[TOKENS_A_TILE];
    unrolled<0, TOKENS_A_TILE>([&]<int I>()
                                   __attribute__((always_inline)) { y[I] = load(to + I * LANES); });
    // Chunk c's products, the end of the one before, and the sums of the one before that.
    for (int c = 0; c < chunks + 2; ++c, x += X_BYTES, w += W_BYTES) {
        unrolled<0, 2>([&]<int ODD>() __attribute__((always_inline)) {
            if (c % 2 != ODD) return;
            if (c < chunks) load_tile<7>(w);
            unrolled<0, CUTS>([&]<int I>() __attribute__((always_inline)) {
                constexpr int own = ODD * CUTS + I, before = (1 - ODD) * CUTS + I;
                if (c < chunks) {
                    load_tile<own>(NO_SUMS, 0);
                    load_tile<4 + I>(x + I * TILE_BYTES);
                    multiply_tile<SIGNED, own, 4 + I, 7>();
                }
                if (c > 0 && c <= chunks) store_tile<before>(sums[1 - ODD][I]);
            });
        });
        if (c > 1) close_tiles<!SIGNED>(x - 2 * X_BYTES, w - 2 * W_BYTES, sums[c % 2], y);
    }
    unrolled<0, TOKENS_A_TILE>([&]<int I>()
                                   __attribute__((always_inline)) { store(to + I * LANES, y[I]); });
}

// Blocks of panels [first, last) of a part against tiles [begin, end) of tokens.
template <Layout F>
inline void meet_in_tiles(const Part& part, int first, int last, int begin, int end,
                          const uint8_t* x, const Target& target) {
    static thread_local Scratch<uint8_t> opened;
    static thread_local Scratch<float> results;
    constexpr bool is_signed = bias(F) != 0;
    static_assert(is_signed != F.has_minimum());
    const int first_panel = first * part.block_panels();
    const int panels = std::min(last * part.block_panels(), part.panels()) - first_panel;
    const int chunks = part.padded_cols() / CHUNK;
    const size_t panel_bytes = static_cast<size_t>(chunks) * W_BYTES;
    uint8_t* w = opened.at_least(panels * panel_bytes);
    float* y = results.at_least(static_cast<size_t>(panels) * SUMS);
    for (int p = 0; p < panels; p += 2) {
        const uint8_t* from = part.panel(first_panel + p);
        const size_t stride = part.unit_stride(first_panel + p);
        uint8_t* to = w + p * panel_bytes;
        if (p + 1 < panels) open_tiles<F, 2>({from, stride, true}, part.units(), to);
        else open_tiles<F, 1>({from, stride, true}, part.units(), to);
    }
    const Tiles tiles;
    for (int i = begin; i < end; ++i) {
        const uint8_t* tokens = x + static_cast<size_t>(i) * chunks * X_BYTES;
        std::fill_n(y, panels * SUMS, 0.0f);
        for (int c = 0; c < chunks; c += CHUNKS_AT_ONCE)
            for (int p = 0; p < panels; ++p)
                stream_tiles<is_signed>(tokens + static_cast<size_t>(c) * X_BYTES,
                                        w + p * panel_bytes + static_cast<size_t>(c) * W_BYTES,
                                        std::min(CHUNKS_AT_ONCE, chunks - c), y + p * SUMS);
        for (int p = 0; p < panels; ++p)
            for (int t = 0; t < TOKENS_A_TILE; ++t)
                target.put(i * TOKENS_A_TILE + t, (first_panel + p) * LANES,
                           mul(load(y + p * SUMS + t * LANES), splat(1 << RAISE)));
    }
}

template <Layout F>
inline void matmul_in_tiles(const Activations& x, const Part& part, const Target& target,
                            const Cut& cut) {
    static thread_local Scratch<uint8_t> scratch;
    const uint8_t* prepared = prepare_tiles<F>(x, scratch);
    pool().run(cut.runs * cut.slabs, [&](int task) {
        const int slab = task / cut.runs, first = task % cut.runs * cut.at_once;
        meet_in_tiles<F>(part, first, std::min(part.blocks(), first + cut.at_once),
                         cut.first_tile(slab), cut.first_tile(slab + 1), prepared, target);
    });
}

inline void tiled_matmul_of(const Activations& x, const Part& part, const Weight* next,
                            const Output& out) {
    with_layout(static_cast<int>(part.layout.type), [&]<Layout F>() {
        if constexpr (is_tiled(F)) {
            const int opened_bytes = part.padded_cols() / CHUNK * 2 * W_BYTES;
            const Cut cut(out.tokens, TOKENS_A_TILE, part.blocks(), opened_bytes);
            if (cut.opens()) return matmul_in_tiles<F>(x, part, Target{out}, cut);
        }
        matmul_of(x, part, next, out);
    });
}

inline void tiled_matmul(const float* x, const Part& part, const Weight* next, const Output& out) {
    if (!is_quantised(part.layout)) return AVX512_OPS.matmul(x, part, next, out);
    tiled_matmul_of({x, out.tokens, part.cols, false}, part, next, out);
}

inline void tiled_gated_matmul(const float* x, const Part& part, const Weight* next,
                               const Output& out) {
    tiled_matmul_of({x, out.tokens, part.cols, true}, part, next, out);
}
