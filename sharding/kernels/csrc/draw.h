// A token from logits: sharding/model/sampling.py says how, and computes the same in slow motion.
// Included inside the namespace of an instruction set.
//
// What takes all tokens runs over a register of them at a time, in the compiler's own vector types.
// What sorts takes few: a filter first drops what it surely drops.

// Float64 numbers in a register.
#if defined(__AVX512F__)
constexpr int WIDE = 8;
#elif defined(__AVX2__)
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif
using D = double __attribute__((vector_size(8 * WIDE)));
using U = uint64_t __attribute__((vector_size(8 * WIDE)));
using F = float __attribute__((vector_size(4 * WIDE)));

template <class T>
inline __attribute__((always_inline)) T load_as(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline __attribute__((always_inline)) bool any_of(U mask) {
    uint64_t any = 0;
    for (int i = 0; i < WIDE; ++i) any |= mask[i];
    return any != 0;
}

// e^x for x <= 0, to a few units in the last place; e^0 is 1, and 0 what is below e^-708.
inline __attribute__((always_inline)) D exp_of(D x) {
    const D bounded = x < -708.0 ? D{} - 708.0 : x;
    // Rounds, and leaves the integer in the last bits.
    const D shifted = bounded * 1.4426950408889634 + 0x1.8p52;
    const D n = shifted - 0x1.8p52;
    const D r = bounded - n * 0x1.62e42fefa38p-1 - n * 0x1.ef35793c7673p-45;
    D p = D{} + 1.0 / 479001600;
    for (const double factorial :
         {39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0})
        p = p * r + 1.0 / factorial;
    const D power = (D)((U)p + ((U)shifted << 52));
    return x < -708.0 ? D{} : power;
}

// Standard Gumbel noise of a request's position, by token: a hash, SplitMix64 (Steele, Lea, Flood
// 2014), of which 52 bits and a half make a uniform number.
struct Noise {
    static constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;
    uint64_t key;

    Noise(uint64_t seed, uint64_t position) : key(mix((mix(seed + GAMMA) ^ position) + GAMMA)) {}

    template <class T>
    static inline __attribute__((always_inline)) T mix(T w) {
        w = (w ^ (w >> 30)) * 0xBF58476D1CE4E5B9u;
        w = (w ^ (w >> 27)) * 0x94D049BB133111EBu;
        return w ^ (w >> 31);
    }
    uint64_t bits(int64_t id) const {
        return mix(key + (static_cast<uint64_t>(id) + 1) * GAMMA) >> 12;
    }
    static double of(uint64_t bits) {
        return -std::log(-std::log((static_cast<double>(bits) + 0.5) * 0x1p-52));
    }
    // With u = (bits + 1/2) / 2^52 and r = 2^52 - bits the noise is at most -log(1 - u) <= (53 -
    // log2 r) log 2. Few tokens can win by that much and need logarithms. (Of bits 0, whose r a
    // double's fraction does not hold, the vector says more.)
    static inline __attribute__((always_inline)) D most(U bits) {
        const U magic = U{} + 0x4330000000000000u;  // 2^52, and an integer below it
        const D r = (D)((((U{} + 1) << 52) - bits) | magic) - 0x1p52;
        const D k = (D)((1076 - ((U)r >> 52)) | magic) - 0x1p52;
        return k * 0.693148;
    }
    static double most(uint64_t bits) {
        return (__builtin_clzll((uint64_t{1} << 52) - bits) - 10) * 0.693148;
    }
};

// The largest of x + noise, among all.
inline int64_t race(const double* x, int padded, const Noise& noise) {
    constexpr int RUN = 64;
    alignas(64) double upper[RUN];
    alignas(64) uint64_t bits[RUN];
    double best = -INFINITY;
    int64_t winner = -1;
    U at;
    for (int i = 0; i < WIDE; ++i)
        at[i] = noise.key + (static_cast<uint64_t>(i) + 1) * Noise::GAMMA;
    for (int first = 0; first < padded; first += RUN) {
        const int n = std::min(RUN, padded - first);
        U some{};
        for (int i = 0; i < n; i += WIDE, at += WIDE * Noise::GAMMA) {
            const U hashed = Noise::mix(at) >> 12;
            const D most = load_as<D>(x + first + i) + Noise::most(hashed);
            std::memcpy(upper + i, &most, sizeof most);
            std::memcpy(bits + i, &hashed, sizeof hashed);
            some |= (U)(most > best);
        }
        if (!any_of(some)) continue;
        for (int i = 0; i < n; ++i) {
            if (upper[i] <= best) continue;
            if (const double score = x[first + i] + Noise::of(bits[i]); score > best) {
                best = score;
                winner = first + i;
            }
        }
    }
    return winner;
}

// A token that a filter left.
struct Left {
    double x, weight;
    int id;

    // The larger, of equals the lower id.
    bool operator<(const Left& other) const { return x != other.x ? x > other.x : id < other.id; }
};

// Calls use(i) for each x[i] > least, in order; least may rise meanwhile.
template <class T, class Use>
inline void for_each_above(const T* x, int n, const T& least, const Use& use) {
    constexpr int RUN = 32;
    for (int first = 0; first < n; first += RUN) {
        const int m = std::min(RUN, n - first);
        if (m == RUN) {
            unsigned some = 0;
            for (int i = 0; i < RUN; ++i) some |= x[first + i] > least;
            if (!some) continue;
        }
        for (int i = first; i < first + m; ++i)
            if (x[i] > least) use(i);
    }
}

// The k largest of x, of equals the first; fewer where fewer are above -infinity.
template <class T>
inline void keep_largest(const T* x, int n, int k, std::vector<Left>& left) {
    left.clear();
    T least = -INFINITY;
    const auto shrink = [&] {
        std::nth_element(left.begin(), left.begin() + k - 1, left.end());
        left.resize(static_cast<size_t>(k));
        least = static_cast<T>(left.back().x);
    };
    const size_t room = 2 * static_cast<size_t>(k) + 64;
    for_each_above(x, n, least, [&](int i) {
        left.push_back({static_cast<double>(x[i]), 0, i});
        if (left.size() == room) shrink();
    });
    if (left.size() > static_cast<size_t>(k)) shrink();
}

// Keeps the likeliest until their weights reach `share`, at least one. Halves what is undecided
// until it is little, and sorts that.
inline void keep_nucleus(std::vector<Left>& left, double share) {
    auto from = left.begin(), to = left.end();
    double before = 0;  // the weights up to `from`
    const auto sum = [](auto i, auto stop) {
        double total = 0;
        for (; i != stop; ++i) total += i->weight;
        return total;
    };
    while (to - from > 32) {
        const auto middle = from + (to - from) / 2;
        std::nth_element(from, middle, to);
        const double with_half = before + sum(from, middle);
        if (with_half < share) {
            before = with_half;
            from = middle;
        } else {
            to = middle;
        }
    }
    std::sort(from, to);
    for (; from != to && before < share; ++from) before += from->weight;
    left.resize(std::max<size_t>(1, static_cast<size_t>(from - left.begin())));
}

// Weights of those that are left; returns their sum.
inline double weigh(std::vector<Left>& left) {
    double total = 0;
    for (size_t first = 0; first < left.size(); first += WIDE) {
        const size_t n = std::min<size_t>(WIDE, left.size() - first);
        D x{};
        for (size_t i = 0; i < n; ++i) x[i] = left[first + i].x;
        const D weights = exp_of(x);
        for (size_t i = 0; i < n; ++i) total += left[first + i].weight = weights[i];
    }
    return total;
}

// Sums of weights: of all tokens, and of those whose x is above -2, -4 and so on.
struct Mass {
    static constexpr int STEPS = 6;
    static constexpr double STEP = 2;
    double total, above[STEPS];
};

// Weights of all.
inline Mass weigh_all(const double* x, int padded, double* weights) {
    D total{}, above[Mass::STEPS]{};
    for (int i = 0; i < padded; i += WIDE) {
        const D one = load_as<D>(x + i), w = exp_of(one);
        std::memcpy(weights + i, &w, sizeof w);
        total += w;
        for (int s = 0; s < Mass::STEPS; ++s) above[s] += one > -Mass::STEP * (s + 1) ? w : D{};
    }
    Mass found{};
    for (int i = 0; i < WIDE; ++i) {
        found.total += total[i];
        for (int s = 0; s < Mass::STEPS; ++s) found.above[s] += above[s][i];
    }
    return found;
}

// Logits in float64, -infinity up to `padded`; false if one is NaN or +infinity.
inline bool widen(const float* logits, int n, int padded, double* x) {
    U bad{};
    int i = 0;
    for (; i + WIDE <= n; i += WIDE) {
        const D wide = __builtin_convertvector(load_as<F>(logits + i), D);
        bad |= ~(U)(wide < INFINITY);
        std::memcpy(x + i, &wide, sizeof wide);
    }
    bool good = !any_of(bad);
    for (; i < n; ++i) {
        x[i] = static_cast<double>(logits[i]);
        good = good && x[i] < INFINITY;
    }
    for (i = n; i < padded; ++i) x[i] = -INFINITY;
    return good;
}

// Bias, penalties and bans; false for an id that there is not. What was counted was seen.
inline bool adjust(const Recipe& how, int n, double* x) {
    const auto exists = [n](int64_t id) { return id >= 0 && id < n; };
    if (!std::all_of(how.biased.begin(), how.biased.end(), exists) ||
        !std::all_of(how.banned.begin(), how.banned.end(), exists))
        return false;
    for (size_t i = 0; i < how.biased.size(); ++i) x[how.biased[i]] += how.bias[i];
    constexpr int word = sizeof(uint64_t);
    for (int first = 0; how.seen && first < n; first += word) {
        const int m = std::min(word, n - first);
        uint64_t some = 0;
        std::memcpy(&some, how.seen + first, static_cast<size_t>(m));
        if (!some) continue;
        for (int i = first; i < first + m; ++i) {
            if (!how.seen[i]) continue;
            if (how.repetition != 1) {
                x[i] = x[i] > 0 ? x[i] / how.repetition : x[i] * how.repetition;
                x[i] = std::min(x[i], std::numeric_limits<double>::max());
            }
            x[i] = x[i] - how.presence * (how.counts[i] > 0);
            x[i] = x[i] - how.frequency * static_cast<double>(how.counts[i]);
        }
    }
    for (const int64_t id : how.banned) x[id] = -INFINITY;
    return true;
}

inline double largest_of(const double* x, int padded) {
    D most = load_as<D>(x);
    for (int i = WIDE; i < padded; i += WIDE) {
        const D next = load_as<D>(x + i);
        most = next > most ? next : most;
    }
    double best = most[0];
    for (int i = 1; i < WIDE; ++i) best = std::max(best, most[i]);
    return best;
}

// What the filters leave of x, shifted so that its largest is 0; one filter is set at least.
inline void filter(const Recipe& how, const double* x, int n, int padded, double* weights,
                   std::vector<Left>& left) {
    if (how.top_k > 0) keep_largest(x, n, static_cast<int>(std::min<int64_t>(how.top_k, n)), left);
    if (how.top_p < 1 && how.top_k > 0) {
        keep_nucleus(left, how.top_p * weigh(left));
    } else if (how.top_p < 1) {
        const Mass mass = weigh_all(x, padded, weights);
        const double share = how.top_p * mass.total;
        const auto keep = [&](int i) { left.push_back({x[i], weights[i], i}); };
        left.clear();
        int step = 0;
        while (step < Mass::STEPS && mass.above[step] < share * (1 + 1e-9)) ++step;
        if (step < Mass::STEPS) {  // those above it are enough, whatever order they are summed in
            for_each_above(x, n, -Mass::STEP * (step + 1), keep);
        } else {  // even together what is dropped weighs less than half of what may be left out
            const double least = mass.total * ((1 - how.top_p) / n / 2);
            for_each_above(weights, n, std::nextafter(least, -1.0), keep);
        }
        keep_nucleus(left, share);
    }
    if (how.min_p > 0) {
        const double least = std::log(how.min_p);
        if (how.top_k > 0 || how.top_p < 1) {
            std::erase_if(left, [&](const Left& it) { return it.x < least; });
        } else {
            left.clear();
            for_each_above(x, n, std::nextafter(least, -INFINITY),
                           [&](int i) { left.push_back({x[i], 0, i}); });
        }
    }
}

inline int64_t draw(const float* logits, int n, const Recipe& how) {
    static thread_local Scratch<double> scratch;
    static thread_local std::vector<Left> left;
    const int padded = (n + WIDE - 1) / WIDE * WIDE;
    double *x = scratch.at_least(2 * static_cast<size_t>(padded)), *weights = x + padded;
    if (!widen(logits, n, padded, x) || !adjust(how, n, x)) return -1;
    const double best = largest_of(x, padded);
    if (best == -INFINITY) return -1;
    if (how.temperature == 0) {
        int first = 0;
        while (x[first] != best) ++first;
        return first;
    }
    for (int i = 0; i < padded; i += WIDE) {
        D scaled = load_as<D>(x + i) - best;
        if (how.temperature != 1) scaled /= how.temperature;  // divisions take longest
        std::memcpy(x + i, &scaled, sizeof scaled);
    }
    const Noise noise(how.seed, how.position);
    if (!(how.top_k > 0 || how.top_p < 1 || how.min_p > 0)) return race(x, padded, noise);
    left.clear();  // of another request's
    filter(how, x, n, padded, weights, left);
    double highest = -INFINITY;
    int64_t winner = -1;
    for (const Left& it : left) {
        const uint64_t bits = noise.bits(it.id);
        if (it.x + Noise::most(bits) < highest) continue;
        const double score = it.x + Noise::of(bits);
        if (score > highest || (score == highest && it.id < winner)) {
            highest = score;
            winner = it.id;
        }
    }
    return winner;
}

// The log of the sum of e^logit, and the largest logit; false unless all are finite or -infinity,
// and one is finite.
inline bool log_sum(const float* logits, int n, double& log_of_sum) {
    constexpr int RUN = 64 * LANES;
    V most = splat(-INFINITY), poison = zero();
    const auto all = [&](const auto& use) {
        alignas(64) float rest[LANES];
        for (int first = 0; first < n; first += LANES) {
            if (first + LANES <= n) {
                use(first, load(logits + first));
            } else {
                std::fill_n(rest, LANES, -INFINITY);
                std::copy(logits + first, logits + n, rest);
                use(first, load(rest));
            }
        }
    };
    // NaN from the first NaN or +infinity on; max passes a NaN by or not, whichever.
    all([&](int, V x) {
        most = max(most, x);
        poison = fma(max(x, splat(-1.0f)), zero(), poison);
    });
    const float best = largest(most);
    if (!(sum(poison) == 0.0f) || !std::isfinite(best)) return false;
    double total = 0;
    V part = zero();
    all([&](int first, V x) {
        part = add(part, exp(sub(x, splat(best))));
        if (first % RUN == RUN - LANES) {
            total += static_cast<double>(sum(part));
            part = zero();
        }
    });
    log_of_sum = static_cast<double>(best) + std::log(total + static_cast<double>(sum(part)));
    return true;
}

inline int score(const float* logits, int n, int64_t token, int alternatives, Scored* out) {
    static thread_local std::vector<Left> left;
    double log_of_sum;
    if (token < 0 || token >= n || !log_sum(logits, n, log_of_sum)) return 0;
    int found = 0;
    const auto put = [&](int64_t id) {
        const auto value = static_cast<float>(static_cast<double>(logits[id]) - log_of_sum);
        out[found++] = {id, std::clamp(value, LEAST_LOGPROB, 0.0f)};
    };
    put(token);
    const int count = std::min(alternatives, n);
    if (count == 0) return found;
    keep_largest(logits, n, count, left);
    std::sort(left.begin(), left.end());
    for (const Left& it : left) put(it.id);
    for (int id = 0; id < n && found <= count; ++id)  // all others are impossible
        if (logits[id] == -INFINITY) put(id);
    return found;
}
