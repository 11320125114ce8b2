#include "batch.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pool.h"

namespace longspan {
namespace {

constexpr int SLICE = 32;  // tokens whose angles one thread computes, a tenth of a millisecond

}  // namespace

Batch::Batch(std::vector<Segment> segments, const double* frequencies, int pairs, bool adjacent)
    : segments_(std::move(segments)) {
    const int tokens = segments_.empty() ? 0 : segments_.back().stop;
    std::vector<int> positions;
    for (const Segment& segment : segments_) {
        const int end = segment.position + segment.stop - segment.first;
        for (int position = segment.position; position < end; ++position) {
            positions.push_back(position);
            page_.push_back(segment.table[position / PAGE]);
            slot_.push_back(position % PAGE);
        }
    }
    cosines_.resize(static_cast<size_t>(tokens) * static_cast<size_t>(pairs));
    sines_.resize(cosines_.size());
    pool().run((tokens + SLICE - 1) / SLICE, [&](int slice) {
        for (int t = slice * SLICE; t < std::min(tokens, (slice + 1) * SLICE); ++t)
            for (int pair = 0; pair < pairs; ++pair) {
                const auto at = static_cast<size_t>(t) * static_cast<size_t>(pairs) + pair;
                const double radians = positions[static_cast<size_t>(t)] * frequencies[pair];
                cosines_[at] = static_cast<float>(std::cos(radians));
                sines_[at] = static_cast<float>(std::sin(radians));
            }
    });
    turn_ = {tokens, pairs, adjacent, cosines_.data(), sines_.data(), page_.data(), slot_.data()};
}

}  // namespace longspan
