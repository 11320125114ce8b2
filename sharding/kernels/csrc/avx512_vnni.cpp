// Products with quantised weights for AVX-512 with products of bytes (VNNI), one by one or in tiles
// (AMX); all else is AVX-512's.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace longspan {
namespace avx512_vnni {
namespace {

#include "simd_avx512.h"
#include "decode.h"
#include "functions.h"
#include "target.h"
#include "digits.h"
#include "panels.h"
#include "products.h"
#include "tiles.h"

}  // namespace
}  // namespace avx512_vnni

const Ops& avx512_vnni_ops() {
    static const Ops ops = [] {
        Ops own = AVX512_OPS;
        own.name = "avx512_vnni";
        own.packing = {Order::Bytes, 2};
        own.matmul = avx512_vnni::matmul;
        own.gated_matmul = avx512_vnni::gated_matmul;
        own.embed_row = avx512_vnni::embed_row;
        return own;
    }();
    return ops;
}

const Ops& avx512_amx_ops() {
    static const Ops ops = [] {
        Ops own = avx512_vnni_ops();
        own.name = "avx512_amx";
        own.matmul = avx512_vnni::tiled_matmul;
        own.gated_matmul = avx512_vnni::tiled_gated_matmul;
        return own;
    }();
    return ops;
}

}  // namespace longspan
#endif
