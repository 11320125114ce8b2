// Decoder blocks one after the other in one call: at one token, Python would spend about as long on
// calling the kernels as they on computing. sharding/kernels/composed.py is the same in Python.
#pragma once

#include <vector>

#include "batch.h"
#include "experts.h"

namespace longspan {

// A block's weights and pages. What it points to belongs to Python, which keeps it. The post norms
// may be absent; heads turn by that rotation of a batch.
struct Layer {
    Norm attention_norm, ffn_norm;
    const Weight *qkv, *output;
    FeedForward feed;
    Pages pages;
    int window;
    Norm attention_post_norm, ffn_post_norm;
    Heads heads;
    int rotation;
    Activation activation;
};

// y [T, I] = x through all layers; y may be x.
//     x += attention(norm(x) @ qkv^T) @ output^T
//     x += (activation(gate) * up) @ down^T  with gate, up = norm(x) @ gate_up^T, or a mixture of
//          such
// What is added is normed first where there is a post norm.
// `wanted`, if not null: rows of y that are wanted, ascending. They become its first rows, and the
// last layer computes of the others keys and values alone.
void run_layers(const Ops& ops, const std::vector<Layer>& layers, const float* x,
                const Batch& batch, const std::vector<int>* wanted, float* y);

// What turns the last layer's hidden states into logits.
struct Head {
    Norm norm;
    const Weight* weight;
};

// logits [T, V] = norm(x) @ weight^T
void run_head(const Ops& ops, const Head& head, const float* x, int tokens, float* logits);
// The likeliest token of each row, the first of equals; -1 where a logit is not finite.
std::vector<int64_t> likeliest(const Ops& ops, const Head& head, const float* x, int tokens);

}  // namespace longspan
