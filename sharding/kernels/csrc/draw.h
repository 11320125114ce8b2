// The draw of a token: sharding/model/sampling.py explains it, and computes the same.
#pragma once

#include <cstdint>

namespace longspan {

// The index i of the largest scaled[i] + noise(seed, position, i), the lowest of equals, -1 if none
// is above -infinity. Noise is standard Gumbel.
int64_t gumbel_argmax(const double* scaled, int64_t n, uint64_t seed, uint64_t position);

}  // namespace longspan
