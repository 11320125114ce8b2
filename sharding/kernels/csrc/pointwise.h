// Norms, gates, rotations: one pass over a batch's rows. Included inside the namespace of an
// instruction set.

// Calls rows(first, stop) over slices of [0, n) rows of `width` elements.
template <class Rows>
inline void by_rows(int n, int width, const Rows& rows) {
    const int slice = std::max(1, POINTWISE_ELEMENTS / std::max(1, width));
    pool().run((n + slice - 1) / slice,
               [&](int i) { rows(i * slice, std::min(n, (i + 1) * slice)); });
}

// e^x to within 0.9 units in the last place (1.2 without fused multiply-adds), measured: 2^n * p(r)
// with |r| <= log(2) / 2 and a fitted polynomial of degree 6 (Muller, Elementary Functions, on
// range reduction). e^0 is 1, e^-inf is 0; NaN stays NaN. Not for x above 89.
inline V exp(V x) {
    const V bounded = max(x, splat(-104.0f));
    const V n = round(mul(bounded, splat(1.44269504088896341f)));
    const V r = fma(n, splat(-1.428606765330187e-6f), fma(n, splat(-0.693145751953125f), bounded));
    V p = splat(1.381452777e-03f);
    for (const float c :
         {8.368746378e-03f, 4.166839272e-02f, 1.666651964e-01f, 4.999999404e-01f, 1.0f, 1.0f})
        p = fma(p, r, splat(c));
    return scale_by_power(p, n);
}

// 2^x to within 1.4 * 2^-24 of it (1.8 without fused multiply-adds), measured: as above, but x - n
// is exact. 2^0 is 1, 2^-inf is 0; NaN stays NaN. Not for x above 127.
inline V exp2(V x) {
    const V bounded = max(x, splat(-150.0f));
    const V n = round(bounded);
    const V r = sub(bounded, n);
    V p = splat(1.535336196e-04f);
    for (const float c : {1.339887502e-03f, 9.618436918e-03f, 5.550332367e-02f, 2.402264774e-01f,
                          6.931471825e-01f, 1.0f})
        p = fma(p, r, splat(c));
    return scale_by_power(p, n);
}

// The sum of squares is kept in 16 lanes, added up in a fixed tree at the end of the row.
inline void rms_norm(const float* x, int tokens, int width, const float* scale, float eps,
                     float* y) {
    by_rows(tokens, width, [&](int first, int stop) {
        for (int t = first; t < stop; ++t) {
            const float* row = x + static_cast<size_t>(t) * width;
            float* out = y + static_cast<size_t>(t) * width;
            V squares = zero();
            int i = 0;
            for (; i + LANES <= width; i += LANES) {
                const V a = load(row + i);
                squares = fma(a, a, squares);
            }
            if (i < width) {
                const V a = load_first(row + i, width - i);
                squares = fma(a, a, squares);
            }
            const float mean = sum(squares) / static_cast<float>(width);
            const V factor = splat(1.0f / std::sqrt(mean + eps));
            for (i = 0; i + LANES <= width; i += LANES)
                store(out + i, mul(mul(load(row + i), factor), load(scale + i)));
            if (i < width) {
                const V a = mul(load_first(row + i, width - i), factor);
                store_first(out + i, mul(a, load_first(scale + i, width - i)), width - i);
            }
        }
    });
}

// Below -89 the result is 0 in float32, and e^-x would be infinite.
inline V silu(V x) { return div(x, add(splat(1.0f), exp(sub(zero(), max(x, splat(-89.0f)))))); }

inline void gated_silu(const float* x, int tokens, int width, float* y) {
    by_rows(tokens, width, [&](int first, int stop) {
        for (int t = first; t < stop; ++t) {
            const float *gate = x + static_cast<size_t>(t) * 2 * width, *up = gate + width;
            float* out = y + static_cast<size_t>(t) * width;
            int i = 0;
            for (; i + LANES <= width; i += LANES)
                store(out + i, mul(silu(load(gate + i)), load(up + i)));
            if (i < width) {
                const V g = silu(load_first(gate + i, width - i));
                store_first(out + i, mul(g, load_first(up + i, width - i)), width - i);
            }
        }
    });
}

inline void rotate_head(const float* x, const float* cosines, const float* sines, const Turn& turn,
                        int dim, float* y) {
    const int apart = turn.adjacent ? 1 : turn.pairs, step = turn.adjacent ? 2 : 1;
    int i = 0;
    for (; !turn.adjacent && i + LANES <= turn.pairs; i += LANES) {
        const V a = load(x + i), b = load(x + i + apart);
        const V cosine = load(cosines + i), sine = load(sines + i);
        store(y + i, sub(mul(a, cosine), mul(b, sine)));
        store(y + i + apart, add(mul(a, sine), mul(b, cosine)));
    }
    for (; i < turn.pairs; ++i) {
        const float a = x[i * step], b = x[i * step + apart];
        y[i * step] = a * cosines[i] - b * sines[i];
        y[i * step + apart] = a * sines[i] + b * cosines[i];
    }
    for (i = 2 * turn.pairs; i < dim; ++i) y[i] = x[i];
}

inline void to_halves(const float* x, int n, uint16_t* y) {
    alignas(64) uint16_t last[LANES];
    int i = 0;
    for (; i + LANES <= n; i += LANES) store_f16(y + i, load(x + i));
    if (i < n) {
        store_f16(last, load_first(x + i, n - i));
        std::memcpy(y + i, last, sizeof(uint16_t) * static_cast<size_t>(n - i));
    }
}

inline void rotate_and_store(const float* qkv, const Turn& turn, const Pages& pages, float* q) {
    const int dim = pages.dim, heads = pages.heads, kv_heads = pages.kv_heads;
    const int width = (heads + 2 * kv_heads) * dim;
    by_rows(turn.tokens, width, [&](int first, int stop) {
        static thread_local Scratch<float> turned_scratch;
        static thread_local Scratch<uint16_t> halves_scratch;
        float* turned = turned_scratch.at_least(static_cast<size_t>(dim));
        uint16_t* halves = halves_scratch.at_least(static_cast<size_t>(dim));
        for (int t = first; t < stop; ++t) {
            const float* row = qkv + static_cast<size_t>(t) * width;
            const float* cosines = turn.cosines + static_cast<size_t>(t) * turn.pairs;
            const float* sines = turn.sines + static_cast<size_t>(t) * turn.pairs;
            float* out = q + static_cast<size_t>(t) * heads * dim;
            for (int h = 0; h < heads; ++h)
                rotate_head(row + h * dim, cosines, sines, turn, dim, out + h * dim);
            for (int g = 0; g < kv_heads; ++g) {
                const size_t page = pages.at(turn.page[t], g);
                rotate_head(row + (heads + g) * dim, cosines, sines, turn, dim, turned);
                to_halves(turned, dim, halves);
                uint16_t* key = pages.keys + page + turn.slot[t];
                for (int d = 0; d < dim; ++d) key[d * LANES] = halves[d];
                to_halves(row + (heads + kv_heads + g) * dim, dim,
                          pages.values + page + turn.slot[t] * dim);
            }
        }
    });
}

// The largest of a run of elements is sought lane by lane, then the run that has it, then the
// place.
inline int64_t argmax(const float* x, int n) {
    constexpr int RUN = 64 * LANES;
    float best = -INFINITY;
    int from = 0;
    V poison = zero();  // NaN from the first NaN or infinity on
    for (int start = 0; start < n; start += RUN) {
        const int stop = std::min(n, start + RUN);
        V most = splat(x[start]);
        int i = start;
        for (; i + LANES <= stop; i += LANES) {
            const V a = load(x + i);
            most = max(most, a);
            poison = fma(a, zero(), poison);
        }
        if (i < stop) {
            const V a = first(load_first(x + i, stop - i), stop - i, most);
            most = max(most, a);
            poison = fma(a, zero(), poison);
        }
        if (const float peak = largest(most); peak > best) {
            best = peak;
            from = start;
        }
    }
    if (n == 0 || sum(poison) != 0.0f) return -1;
    while (x[from] != best) ++from;
    return from;
}
