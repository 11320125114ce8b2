// Norms, gates, rotations: one pass over a batch's rows. Included inside the namespace of an
// instruction set.

// Calls rows(first, stop) over slices of [0, n) rows of `width` elements.
template <class Rows>
inline void by_rows(int n, int width, const Rows& rows) {
    const int slice = std::max(1, POINTWISE_ELEMENTS / std::max(1, width));
    pool().run((n + slice - 1) / slice,
               [&](int i) { rows(i * slice, std::min(n, (i + 1) * slice)); });
}

// What a row is multiplied by before its scale: 1 / sqrt(mean(x^2) + eps). The sum of squares is kept
// in 16 lanes, added up in a fixed tree at the end of the row.
inline V norm_factor(const float* x, int width, float eps) {
    V squares = zero();
    int i = 0;
    for (; i + LANES <= width; i += LANES) {
        const V a = load(x + i);
        squares = fma(a, a, squares);
    }
    if (i < width) {
        const V a = load_first(x + i, width - i);
        squares = fma(a, a, squares);
    }
    const float mean = sum(squares) / static_cast<float>(width);
    return splat(1.0f / std::sqrt(mean + eps));
}

// y = norm of x [width], on top of the residual if ADDED; y may be x or the residual.
template <bool ADDED>
inline void norm_row(const float* x, int width, const Norm& norm, const float* residual, float* y) {
    const V factor = norm_factor(x, width, norm.eps);
    int i = 0;
    for (; i + LANES <= width; i += LANES) {
        const V a = mul(mul(load(x + i), factor), load(norm.scale + i));
        store(y + i, ADDED ? add(load(residual + i), a) : a);
    }
    if (i < width) {
        const int n = width - i;
        const V a = mul(mul(load_first(x + i, n), factor), load_first(norm.scale + i, n));
        store_first(y + i, ADDED ? add(load_first(residual + i, n), a) : a, n);
    }
}

inline void rms_norm(const float* x, int tokens, int width, const Norm& norm,
                     const float* residual, float* y) {
    by_rows(tokens, width, [&](int first, int stop) {
        for (size_t t = first; t < static_cast<size_t>(stop); ++t) {
            const size_t at = t * static_cast<size_t>(width);
            if (residual) norm_row<true>(x + at, width, norm, residual + at, y + at);
            else norm_row<false>(x + at, width, norm, nullptr, y + at);
        }
    });
}

template <class Activate>
inline void gated_by(const float* x, int tokens, int width, float* y, const Activate& activate) {
    by_rows(tokens, width, [&](int first, int stop) {
        for (int t = first; t < stop; ++t) {
            const float *gate = x + static_cast<size_t>(t) * 2 * width, *up = gate + width;
            float* out = y + static_cast<size_t>(t) * width;
            int i = 0;
            for (; i + LANES <= width; i += LANES)
                store(out + i, mul(activate(load(gate + i)), load(up + i)));
            if (i < width) {
                const V g = activate(load_first(gate + i, width - i));
                store_first(out + i, mul(g, load_first(up + i, width - i)), width - i);
            }
        }
    });
}

inline void gated(const float* x, int tokens, int width, Activation activation, float* y) {
    if (activation == Activation::Silu)
        gated_by(x, tokens, width, y, [](V gate) { return silu(gate); });
    else
        gated_by(x, tokens, width, y, [](V gate) { return gelu(gate); });
}

// How one token turns, an element beside the other: what it is multiplied by, and its partner.
struct Angles {
    const float *cosines, *sines;  // of each pair
    const float *own, *partner;    // of each element, where partners are adjacent

    // Cosines twice, sines with either sign, in `memory` of 4 * pairs.
    static Angles of(const Turn& turn, int t, float* memory) {
        const auto first = static_cast<size_t>(t) * static_cast<size_t>(turn.pairs);
        float *own = memory, *partner = memory + 2 * turn.pairs;
        const Angles angles{turn.cosines + first, turn.sines + first, own, partner};
        for (int i = 0; turn.adjacent && i < turn.pairs; ++i) {
            own[2 * i] = own[2 * i + 1] = angles.cosines[i];
            partner[2 * i] = -angles.sines[i];
            partner[2 * i + 1] = angles.sines[i];
        }
        return angles;
    }
};

// Elements a and b of a pair become a cos - b sin and a sin + b cos.
inline void rotate_head(const float* x, const Angles& by, const Turn& turn, int dim, float* y) {
    const int turned = 2 * turn.pairs;
    int i = 0;
    if (turn.adjacent) {
        for (; i + LANES <= turned; i += LANES) {
            const V a = load(x + i);
            store(y + i, add(mul(a, load(by.own + i)), mul(swap_pairs(a), load(by.partner + i))));
        }
        for (; i < turned; ++i) y[i] = x[i] * by.own[i] + x[i ^ 1] * by.partner[i];
    } else {
        const float* other = x + turn.pairs;
        for (; i + LANES <= turn.pairs; i += LANES) {
            const V a = load(x + i), b = load(other + i);
            const V cosine = load(by.cosines + i), sine = load(by.sines + i);
            store(y + i, sub(mul(a, cosine), mul(b, sine)));
            store(y + turn.pairs + i, add(mul(a, sine), mul(b, cosine)));
        }
        for (; i < turn.pairs; ++i) {
            y[i] = x[i] * by.cosines[i] - other[i] * by.sines[i];
            y[turn.pairs + i] = x[i] * by.sines[i] + other[i] * by.cosines[i];
        }
    }
    for (i = turned; i < dim; ++i) y[i] = x[i];
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

// A head with its part of the bias, normed: x itself where there is neither, else `room` [dim].
inline const float* readied(const float* x, const float* bias, const Norm& norm, int dim,
                            float* room) {
    if (bias) {
        int i = 0;
        for (; i + LANES <= dim; i += LANES) store(room + i, add(load(x + i), load(bias + i)));
        for (; i < dim; ++i) room[i] = x[i] + bias[i];
        x = room;
    }
    if (norm.scale) {
        norm_row<false>(x, dim, norm, nullptr, room);
        x = room;
    }
    return x;
}

inline void rotate_and_store(const float* qkv, const Heads& own, const Turn& turn,
                             const Pages& pages, float* q) {
    const int dim = pages.dim, heads = pages.heads, kv_heads = pages.kv_heads;
    const int width = (heads + 2 * kv_heads) * dim;
    by_rows(turn.tokens, width, [&](int first, int stop) {
        static thread_local Scratch<float> head_scratch, angles_scratch;
        static thread_local Scratch<uint16_t> halves_scratch;
        float* room = head_scratch.at_least(2 * static_cast<size_t>(dim));
        float* turned = room + dim;
        float* angles = angles_scratch.at_least(4 * static_cast<size_t>(turn.pairs));
        uint16_t* halves = halves_scratch.at_least(static_cast<size_t>(dim));
        for (int t = first; t < stop; ++t) {
            const float* row = qkv + static_cast<size_t>(t) * width;
            const auto head = [&](int h, const Norm& norm) {
                const float* bias = own.bias ? own.bias + h * dim : nullptr;
                return readied(row + h * dim, bias, norm, dim, room);
            };
            const Angles by = Angles::of(turn, t, angles);
            float* out = q + static_cast<size_t>(t) * heads * dim;
            for (int h = 0; h < heads; ++h)
                rotate_head(head(h, own.q), by, turn, dim, out + h * dim);
            for (int g = 0; g < kv_heads; ++g) {
                const size_t page = pages.at(turn.page[t], g);
                rotate_head(head(heads + g, own.k), by, turn, dim, turned);
                to_halves(turned, dim, halves);
                uint16_t* key = pages.keys + page + turn.slot[t];
                for (int d = 0; d < dim; ++d) key[d * LANES] = halves[d];
                to_halves(head(heads + kv_heads + g, Norm{}), dim,
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
