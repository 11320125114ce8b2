#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "numbers.h"
#include "pool.h"

namespace longspan {
namespace {

// A task's share of rows that are only copied or added up, in elements.
constexpr int SLICE_ELEMENTS = 1 << 14;

// Chooses `used` of n experts, `ids` ascending, and their weights.
void choose(const float* logits, int n, int used, int* ids, float* weights) {
    bool finite = true;
    int count = 0;
    for (int e = 0; e < n; ++e) {
        finite = finite && std::isfinite(logits[e]);
        // Only a larger one comes before another: of equals the first are chosen.
        if (count == used && !(logits[e] > logits[ids[used - 1]])) continue;
        int at = count < used ? count++ : used - 1;
        for (; at > 0 && logits[e] > logits[ids[at - 1]]; --at) ids[at] = ids[at - 1];
        ids[at] = e;
    }
    if (!finite) {
        std::iota(ids, ids + used, 0);
        std::fill(weights, weights + used, std::numeric_limits<float>::quiet_NaN());
        return;
    }
    static thread_local Scratch<double> scratch;
    double *powers = scratch.at_least(static_cast<size_t>(used)), total = 0;
    const double most = logits[ids[0]];
    std::sort(ids, ids + used);
    for (int i = 0; i < used; ++i) total += powers[i] = std::exp(logits[ids[i]] - most);
    for (int i = 0; i < used; ++i) weights[i] = static_cast<float>(powers[i] / total);
}

// Which expert takes which tokens. Rows of a token for each of its experts are grouped by expert:
// those of expert e are [first[e], first[e + 1]). One for each calling thread.
struct Routes {
    int *ids, *rows;  // [T, used]: a token's experts, and the row of each
    int* token;       // [T * used]: a row's token
    int* first;       // [E + 1]
    int* alone;       // [E]: experts that are one thread's each
    float* weights;   // [T, used]

    Routes(const float* logits, int tokens, int experts, int used) {
        static thread_local Scratch<int> scratch;
        static thread_local Scratch<float> weights_scratch;
        const int all = tokens * used;
        ids = scratch.at_least(3 * static_cast<size_t>(all) + 2 * static_cast<size_t>(experts) + 1);
        rows = ids + all;
        token = rows + all;
        first = token + all;
        alone = first + experts + 1;
        weights = weights_scratch.at_least(static_cast<size_t>(all));
        const int slice = std::max(1, SLICE_ELEMENTS / (4 * experts));
        pool().run((tokens + slice - 1) / slice, [&](int task) {
            for (int t = task * slice; t < std::min(tokens, (task + 1) * slice); ++t)
                choose(logits + static_cast<size_t>(t) * experts, experts, used, ids + t * used,
                       weights + t * used);
        });
        group(tokens, experts, used);
    }

    int count(int expert) const { return first[expert + 1] - first[expert]; }

  private:
    void group(int tokens, int experts, int used) {
        std::fill(first, first + experts + 1, 0);
        for (int i = 0; i < tokens * used; ++i) ++first[ids[i] + 1];
        std::partial_sum(first, first + experts + 1, first);
        int* next = alone;  // not needed before
        std::copy(first, first + experts, next);
        for (int i = 0; i < tokens * used; ++i) {
            rows[i] = next[ids[i]]++;
            token[rows[i]] = i / used;
        }
    }
};

// One expert's products with its tokens: `tokens` rows of `out`, not yet weighted.
void run_expert(const Ops& ops, const Weight& gate_up, const Weight& down, Activation activation,
                const float* x, const int* token, int tokens, float* out) {
    static thread_local Scratch<float> scratch;
    const auto n = static_cast<size_t>(tokens), hidden = static_cast<size_t>(gate_up.cols());
    const auto wide = static_cast<size_t>(gate_up.rows()), ffn = static_cast<size_t>(down.cols());
    float* taken = scratch.at_least(n * (hidden + wide + ffn));
    float *both = taken + n * hidden, *gated = both + n * wide;
    for (size_t i = 0; i < n; ++i)
        std::memcpy(taken + i * hidden, x + static_cast<size_t>(token[i]) * hidden,
                    hidden * sizeof(float));
    matmul(ops, taken, tokens, gate_up, &down, nullptr, both);
    gated_matmul(ops, both, tokens, activation, down, nullptr, nullptr, gated, out);
}

// Rows [begin, end) of y: products and sums are rounded one by one, on every processor.
void mix(const Routes& routes, int begin, int end, int used, size_t hidden, const float* products,
         const float* residual, float* y) {
    for (int t = begin; t < end; ++t) {
        float* out = y + static_cast<size_t>(t) * hidden;
        if (!residual) std::fill(out, out + hidden, 0.0f);
        else if (residual != y)
            std::memcpy(out, residual + static_cast<size_t>(t) * hidden, hidden * sizeof(float));
        for (int u = t * used; u < (t + 1) * used; ++u) {
            const float weight = routes.weights[u];
            const float* product = products + static_cast<size_t>(routes.rows[u]) * hidden;
            for (size_t i = 0; i < hidden; ++i) out[i] += weight * product[i];
        }
    }
}

}  // namespace

void mix_experts(const Ops& ops, const FeedForward& feed, Activation activation, const float* x,
                 int tokens, const float* residual, float* y) {
    if (tokens == 0) return;
    static thread_local Scratch<float> scratch;
    const int experts = feed.router->rows(), used = feed.used, all = tokens * used;
    const auto hidden = static_cast<size_t>(feed.router->cols());
    float* products = scratch.at_least(static_cast<size_t>(all) * hidden +
                                       static_cast<size_t>(tokens) * experts);
    float* logits = products + static_cast<size_t>(all) * hidden;
    matmul(ops, x, tokens, *feed.router, nullptr, nullptr, logits);
    const Routes routes(logits, tokens, experts, used);
    const auto run = [&](int e) {
        const int first = routes.first[e];
        run_expert(ops, *feed.gate_up[e], *feed.down[e], activation, x, routes.token + first,
                   routes.count(e), products + static_cast<size_t>(first) * hidden);
    };
    // A thread takes whole experts, each without waiting for another thread. One with more rows
    // than half a thread's share is computed by all threads: others would wait for its last.
    int alone = 0;
    for (int e = 0; e < experts; ++e) {
        const int64_t count = routes.count(e);
        if (count * 2 * pool().threads() > all) run(e);
        else if (count > 0) routes.alone[alone++] = e;
    }
    pool().run(alone, [&](int i) { run(routes.alone[i]); });
    const int slice = std::max(1, SLICE_ELEMENTS / (used * static_cast<int>(hidden)));
    pool().run((tokens + slice - 1) / slice, [&](int task) {
        mix(routes, task * slice, std::min(tokens, (task + 1) * slice), used, hidden, products,
            residual, y);
    });
}

}  // namespace longspan
