// One instruction set's kernels: all of them in a namespace of its own, and their table. The vector
// type decides; the arithmetic is written once.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.h"
#include "ops.h"
#include "pool.h"

namespace longspan {
namespace LONGSPAN_ISA {
namespace {

#include LONGSPAN_SIMD
#include "decode.h"
#include "functions.h"
#include "target.h"
#include "matmul.h"
#include "pointwise.h"
#include "attention.h"
#include "draw.h"

}  // namespace
}  // namespace LONGSPAN_ISA

const Ops LONGSPAN_OPS{LONGSPAN_ISA::ISA_NAME,
                       {Order::Values, LONGSPAN_ISA::STREAM_PANELS},
                       LONGSPAN_ISA::matmul,
                       LONGSPAN_ISA::embed_row,
                       LONGSPAN_ISA::rms_norm,
                       LONGSPAN_ISA::gated,
                       LONGSPAN_ISA::rotate_and_store,
                       LONGSPAN_ISA::attention,
                       LONGSPAN_ISA::argmax,
                       LONGSPAN_ISA::draw,
                       LONGSPAN_ISA::score,
                       nullptr};

}  // namespace longspan
