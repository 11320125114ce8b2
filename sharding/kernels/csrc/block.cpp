#include "block.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"
#include "pool.h"

namespace longspan {
namespace {

// What lies between the steps of a block. One for each calling thread; nothing outlives a call.
struct Between {
    float *normed, *wide, *q, *mixed;

    Between(const Layer& layer, size_t tokens) {
        static thread_local Scratch<float> scratch;
        const size_t hidden = tokens * layer.qkv->cols(), queries = tokens * layer.output->cols();
        const bool one = layer.feed.router == nullptr;  // experts have their own between
        const size_t ffn = one ? tokens * layer.feed.down[0]->cols() : 0;
        const size_t both = one ? tokens * layer.feed.gate_up[0]->rows() : 0;
        const size_t most = std::max(tokens * layer.qkv->rows(), both);
        normed = scratch.at_least(hidden + most + std::max(2 * queries, ffn));
        wide = normed + hidden;
        q = wide + most;
        mixed = q + queries;
    }
};

// Row rows[i] of x [T, width] becomes row i of y; y may be x, as rows ascend.
void pick(const float* x, const std::vector<int>& rows, int width, float* y) {
    const auto n = static_cast<size_t>(width);
    for (size_t i = 0; i < rows.size(); ++i)
        std::memmove(y + i * n, x + static_cast<size_t>(rows[i]) * n, n * sizeof(float));
}

// A segment for each of these rows, which follow one another.
std::vector<Segment> alone(const std::vector<Segment>& segments, const std::vector<int>& rows) {
    std::vector<Segment> picked;
    auto at = segments.begin();
    for (const int row : rows) {
        while (row >= at->stop) ++at;
        const int i = static_cast<int>(picked.size());
        picked.push_back({i, i + 1, at->position + row - at->first, at->table});
    }
    return picked;
}

// `step(residual, y)` writes what it adds to x on top of x into y, through `between` if that is
// normed first. y may be x.
template <class Step>
void add_onto(const Ops& ops, const Norm& post_norm, const float* x, int tokens, int hidden,
              float* between, float* y, const Step& step) {
    if (!post_norm.scale) return step(x, y);
    step(nullptr, between);
    ops.rms_norm(between, tokens, hidden, post_norm, x, y);
}

// `wanted`, if not null: the only rows of which more is computed than keys and values.
void run_layer(const Ops& ops, const Layer& layer, const Weight* next, const float* x,
               const Batch& batch, const std::vector<int>* wanted, float* y) {
    int tokens = batch.tokens();
    const int hidden = layer.qkv->cols();
    const Between at(layer, static_cast<size_t>(tokens));
    ops.rms_norm(x, tokens, hidden, layer.attention_norm, nullptr, at.normed);
    matmul(ops, at.normed, tokens, *layer.qkv, nullptr, nullptr, at.wide);
    const auto& segments = batch.segments(layer.window);
    ops.rotate_and_store(at.wide, layer.heads, batch.turn(layer.rotation, layer.window),
                         layer.pages, at.q);
    std::vector<Segment> picked;
    if (wanted) {
        if (wanted->empty()) return;
        picked = alone(segments, *wanted);
        pick(at.q, *wanted, layer.output->cols(), at.q);
        pick(x, *wanted, hidden, y);
        x = y;
        tokens = static_cast<int>(wanted->size());
    }
    ops.attention(at.q, wanted ? picked : segments, layer.pages, layer.window, layer.output,
                  at.mixed);
    add_onto(ops, layer.attention_post_norm, x, tokens, hidden, at.normed, y,
             [&](const float* residual, float* out) {
                 matmul(ops, at.mixed, tokens, *layer.output, layer.feed.first(), residual, out);
             });
    ops.rms_norm(y, tokens, hidden, layer.ffn_norm, nullptr, at.normed);
    const FeedForward& feed = layer.feed;
    if (!feed.router)
        matmul(ops, at.normed, tokens, *feed.gate_up[0], feed.down[0], nullptr, at.wide);
    add_onto(ops, layer.ffn_post_norm, y, tokens, hidden, at.normed, y,
             [&](const float* residual, float* out) {
                 if (feed.router)
                     mix_experts(ops, feed, layer.activation, at.normed, tokens, residual, out);
                 else
                     gated_matmul(ops, at.wide, tokens, layer.activation, *feed.down[0], next,
                                  residual, at.q, out);
             });
}

}  // namespace

void run_layers(const Ops& ops, const std::vector<Layer>& layers, const float* x,
                const Batch& batch, const std::vector<int>* wanted, float* y) {
    const Pool::Run together(pool());
    for (size_t i = 0; i < layers.size(); ++i) {
        const bool last = i + 1 == layers.size();
        run_layer(ops, layers[i], last ? nullptr : layers[i + 1].qkv, i ? y : x, batch,
                  last ? wanted : nullptr, y);
    }
}

void run_head(const Ops& ops, const Head& head, const float* x, int tokens, float* logits) {
    static thread_local Scratch<float> scratch;
    const int hidden = head.weight->cols();
    float* normed = scratch.at_least(static_cast<size_t>(tokens) * hidden);
    ops.rms_norm(x, tokens, hidden, head.norm, nullptr, normed);
    matmul(ops, normed, tokens, *head.weight, nullptr, nullptr, logits);
}

std::vector<int64_t> likeliest(const Ops& ops, const Head& head, const float* x, int tokens) {
    const auto vocab = static_cast<size_t>(head.weight->rows());
    // Not kept: rows of a whole vocabulary are too large for memory that nobody counts.
    Scratch<float> scratch;
    float* logits = scratch.at_least(tokens * vocab);
    run_head(ops, head, x, tokens, logits);
    std::vector<int64_t> ids;
    for (int t = 0; t < tokens; ++t)
        ids.push_back(ops.argmax(logits + t * vocab, static_cast<int>(vocab)));
    return ids;
}

}  // namespace longspan
