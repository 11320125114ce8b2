#include "ops.h"

#include <atomic>

#include "pool.h"

namespace longspan {
namespace {

std::atomic<bool>& pairing() {
#if defined(__x86_64__)
    static std::atomic<bool> yes = [] {
        __builtin_cpu_init();
        return __builtin_cpu_is("amd") != 0;
    }();
#else
    static std::atomic<bool> yes = false;
#endif
    return yes;
}

}  // namespace

bool pairs_columns() { return pairing().load(std::memory_order_relaxed); }
void pair_columns(bool yes) { pairing().store(yes); }

void matmul(const Ops& ops, const float* x, int tokens, const Weight& weight, const Weight* next,
            const float* residual, float* y) {
    if (tokens == 0) return;
    int column = 0;
    for (const Part& part : weight.parts()) {
        ops.matmul(x, part, next, {residual, y, weight.rows(), column, part.rows, tokens});
        column += part.rows;
    }
}

void gated_matmul(const Ops& ops, const float* x, int tokens, Activation activation,
                  const Weight& weight, const Weight* next, const float* residual, float* gated,
                  float* y) {
    if (tokens == 0) return;
    const Part& first = weight.parts()[0];
    if (ops.gated_matmul && activation == Activation::Silu && weight.parts().size() == 1 &&
        is_quantised(first.layout))
        return ops.gated_matmul(x, first, next,
                                {residual, y, weight.rows(), 0, weight.rows(), tokens});
    ops.gated(x, tokens, weight.cols(), activation, gated);
    matmul(ops, gated, tokens, weight, next, residual, y);
}

void embed(const Ops& ops, const Weight& weight, const std::vector<int64_t>& ids, float* y) {
    pool().run(static_cast<int>(ids.size()), [&](int t) {
        int64_t row = ids[static_cast<size_t>(t)];
        for (const Part& part : weight.parts()) {
            if (row < part.rows) {
                ops.embed_row(part, static_cast<int>(row),
                              y + static_cast<size_t>(t) * weight.cols());
                break;
            }
            row -= part.rows;
        }
    });
}

}  // namespace longspan
