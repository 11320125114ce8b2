// Feed-forwards of decoder blocks: of one pair of matrices, or of a mixture of experts, of which
// each token takes a few. sharding/kernels/experts.py is the same in Python.
#pragma once

#include <vector>

#include "ops.h"

namespace longspan {

// With a router [E, I]: an expert is gate_up[e] and down[e], and a token takes `used` of them.
// Without: one pair. What it points to belongs to Python, which keeps it.
struct FeedForward {
    const Weight* router;
    std::vector<const Weight*> gate_up, down;
    int used;

    // What is read of it first.
    const Weight* first() const { return router ? router : gate_up[0]; }
};

// y[T, I] = residual + sum over a token's experts, in ascending order, of
//     weight * (activation(gate) * up) @ down^T  with gate, up = x @ gate_up^T
// They are those with the largest of x @ router^T, the first of equals, and their weights the
// softmax over them: NaN if any of the token's logits is not finite. `residual` may be null; y may
// be that, or x.
void mix_experts(const Ops& ops, const FeedForward& feed, Activation activation, const float* x,
                 int tokens, const float* residual, float* y);

}  // namespace longspan
