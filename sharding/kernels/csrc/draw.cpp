#include "draw.h"

#include <cmath>

namespace longspan {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014).
constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;

uint64_t mix(uint64_t w) {
    w = (w ^ (w >> 30)) * 0xBF58476D1CE4E5B9u;
    w = (w ^ (w >> 27)) * 0x94D049BB133111EBu;
    return w ^ (w >> 31);
}

}  // namespace

int64_t gumbel_argmax(const double* scaled, int64_t n, uint64_t seed, uint64_t position) {
    const uint64_t key = mix((mix(seed + GAMMA) ^ position) + GAMMA);
    int64_t winner = -1;
    double best = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        const uint64_t bits = mix(key + (static_cast<uint64_t>(i) + 1) * GAMMA) >> 12;
        // With u = (bits + 1/2) / 2^52 and r = 2^52 - bits the noise -log(-log u) is at most
        // -log(1 - u) <= (53 - log2 r) log 2. Few tokens can win by that much and need logarithms.
        const uint64_t r = (uint64_t{1} << 52) - bits;
        const double most = (__builtin_clzll(r) - 10) * 0.693148;
        if (scaled[i] + most <= best) continue;
        const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;
        const double score = scaled[i] - std::log(-std::log(u));
        if (score > best) {
            best = score;
            winner = i;
        }
    }
    return winner;
}

}  // namespace longspan
