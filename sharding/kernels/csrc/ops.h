// The kernels of one instruction set, as a table of functions. Pointers are to float32 unless they
// say otherwise; matrices are row-major.
#pragma once

#include <cstdint>
#include <vector>

#include "weight.h"

namespace longspan {

// Slots of a page.
constexpr int PAGE = 16;

// One segment of a batch: rows [first, stop) are one request's tokens from `position` on, whose
// pages are table[0], table[1], ...
struct Segment {
    int first, stop, position;
    const int64_t* table;
};

// Sizes of attention, and one layer's FP16 pages: keys [P, G, D, PAGE], values [P, G, PAGE, D].
struct Pages {
    int heads, kv_heads, dim;
    uint16_t *keys, *values;

    size_t at(int64_t page, int kv_head) const {
        return (static_cast<size_t>(page) * kv_heads + kv_head) * PAGE * dim;
    }
};

// Where a batch's tokens go and how they turn: page and slot of each token, cosines and sines
// [T, pairs]. Pair i of a head is elements (2i, 2i + 1) if `adjacent`, else (i, i + pairs).
struct Turn {
    int tokens, pairs;
    bool adjacent;
    const float *cosines, *sines;
    const int64_t *page, *slot;
};

// RMS norm of rows, or of heads.
struct Norm {
    const float* scale;  // null for no norm
    float eps;
};

// What becomes of a token's heads before they turn: a bias of all of them, norms of queries and of
// keys. Each may be absent; both norms or none.
struct Heads {
    const float* bias;
    Norm q, k;
};

// What a gate's input goes through; GELU in its approximation by tanh.
enum class Activation { Silu, Gelu };

// Where the products with one part of a weight go: columns [column, column + rows) of y [tokens,
// stride], on top of the residual's if there is one (y itself, maybe).
struct Output {
    const float* residual;
    float* y;
    int stride, column, rows, tokens;
};

// How a token is drawn: sharding/batch.py has what the numbers mean.
struct Recipe {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k;
    // By token, in the prompt or drawn, and how often drawn; null where nothing is penalised.
    const uint8_t* seen;
    const float* counts;
    std::vector<int64_t> biased;
    std::vector<double> bias;
    std::vector<int64_t> banned;
    uint64_t seed, position;
};

// A token's log-probability; no lower one is told.
constexpr float LEAST_LOGPROB = -9999;
struct Scored {
    int64_t id;
    float logprob;
};

struct Ops {
    const char* name;
    // How weights must be packed; in another order they cannot be read, with another number of
    // panels abreast more slowly.
    Packing packing;
    // The part's columns of residual + x[T, I] @ weight^T. `next`, if not null, is the weight that
    // will be read after this one.
    void (*matmul)(const float* x, const Part& part, const Weight* next, const Output& out);
    // y[I] = row `row` of the part.
    void (*embed_row)(const Part& part, int row, float* y);
    // On top of the residual, if it is not null; y may be that.
    void (*rms_norm)(const float* x, int tokens, int width, const Norm& norm,
                     const float* residual, float* y);
    // y[T, F] = activation(x[:, :F]) * x[:, F:]
    void (*gated)(const float* x, int tokens, int width, Activation activation, float* y);
    // Splits qkv [T, (H + 2G) * D]; turned queries go to q [T, H * D], keys and values to pages.
    void (*rotate_and_store)(const float* qkv, const Heads& heads, const Turn& turn,
                             const Pages& pages, float* q);
    // y[T, H * D]; a token sees the last `window` slots up to its own, all of them if 0. `next` as
    // above.
    void (*attention)(const float* q, const std::vector<Segment>& segments, const Pages& pages,
                      int window, const Weight* next, float* y);
    // Where the largest of x[n] is, the first of equals; -1 unless all are finite.
    int64_t (*argmax)(const float* x, int n);
    // The token drawn from logits[n]; -1 if a logit is NaN or +infinity, or none is left to draw.
    int64_t (*draw)(const float* logits, int n, const Recipe& how);
    // The token, then so many of the likeliest by falling logits, equals by rising id; returns how
    // many in all, 0 if a logit is NaN or +infinity, or none is finite.
    int (*score)(const float* logits, int n, int64_t token, int alternatives, Scored* out);
    // matmul of what `gated` makes of x[T, 2 I] by SiLU, without storing that; null if there is
    // none. Not for the float formats.
    void (*gated_matmul)(const float* x, const Part& part, const Weight* next, const Output& out);
};

extern const Ops AVX512_OPS, AVX2_OPS, PORTABLE_OPS;
// Those of AVX-512 but for products with quantised weights; and those but for many tokens, to the
// same bits.
const Ops& avx512_vnni_ops();
const Ops& avx512_amx_ops();

// Whether products of many tokens take columns in pairs (products.h): as is faster on this
// processor, or as the last call of `pair_columns` said. No bit of a result depends on it.
bool pairs_columns();
void pair_columns(bool yes);

// y[T, O] = residual + x[T, I] @ weight^T; `residual` may be null, or y itself. `next` as above.
void matmul(const Ops& ops, const float* x, int tokens, const Weight& weight, const Weight* next,
            const float* residual, float* y);
// The same of gated(x[T, 2 I]), for which there is room in `gated` [T, I].
void gated_matmul(const Ops& ops, const float* x, int tokens, Activation activation,
                  const Weight& weight, const Weight* next, const float* residual, float* gated,
                  float* y);
// y[T, I] = rows ids[t] of the weight.
void embed(const Ops& ops, const Weight& weight, const std::vector<int64_t>& ids, float* y);

}  // namespace longspan
