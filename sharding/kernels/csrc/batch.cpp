#include "batch.h"

#include <cmath>
#include <utility>

namespace longspan {

Batch::Batch(std::vector<Segment> segments, const double* frequencies, int pairs, bool adjacent)
    : segments_(std::move(segments)) {
    const int tokens = segments_.empty() ? 0 : segments_.back().stop;
    const auto angles = static_cast<size_t>(tokens) * static_cast<size_t>(pairs);
    cosines_.reserve(angles);
    sines_.reserve(angles);
    for (const Segment& segment : segments_) {
        const int end = segment.position + segment.stop - segment.first;
        for (int position = segment.position; position < end; ++position) {
            page_.push_back(segment.table[position / PAGE]);
            slot_.push_back(position % PAGE);
            for (int pair = 0; pair < pairs; ++pair) {
                const double radians = position * frequencies[pair];
                cosines_.push_back(static_cast<float>(std::cos(radians)));
                sines_.push_back(static_cast<float>(std::sin(radians)));
            }
        }
    }
    turn_ = {tokens, pairs, adjacent, cosines_.data(), sines_.data(), page_.data(), slot_.data()};
}

}  // namespace longspan
