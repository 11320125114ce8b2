#include "batch.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "pool.h"

namespace longspan {
namespace {

constexpr int SLICE = 32;  // tokens whose angles one thread computes, a tenth of a millisecond

}  // namespace

Batch::Batch(std::vector<Segment> segments, const std::vector<const int64_t*>& window_tables,
             const double* frequencies, const std::vector<double>& gains, int pairs, bool adjacent)
    : segments_(std::move(segments)),
      rotations_(static_cast<int>(gains.size())),
      pairs_(pairs),
      adjacent_(adjacent) {
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
    for (size_t i = 0; i < window_tables.size(); ++i) {
        Segment windowed = segments_[i];
        windowed.table = window_tables[i];
        windowed_.push_back(windowed);
        for (int row = windowed.first; row < windowed.stop; ++row)
            window_page_.push_back(windowed.table[positions[static_cast<size_t>(row)] / PAGE]);
    }
    const auto width = static_cast<size_t>(pairs), each = static_cast<size_t>(tokens) * width;
    cosines_.resize(gains.size() * each);
    sines_.resize(cosines_.size());
    pool().run((tokens + SLICE - 1) / SLICE, [&](int slice) {
        for (size_t rotation = 0; rotation < gains.size(); ++rotation)
            for (int t = slice * SLICE; t < std::min(tokens, (slice + 1) * SLICE); ++t)
                for (size_t pair = 0; pair < width; ++pair) {
                    const size_t at = rotation * each + static_cast<size_t>(t) * width + pair;
                    const double radians =
                        positions[static_cast<size_t>(t)] * frequencies[rotation * width + pair];
                    cosines_[at] = static_cast<float>(std::cos(radians) * gains[rotation]);
                    sines_[at] = static_cast<float>(std::sin(radians) * gains[rotation]);
                }
    });
}

Turn Batch::turn(int rotation, int window) const {
    const size_t first = static_cast<size_t>(rotation) * page_.size() * static_cast<size_t>(pairs_);
    const auto& page = window && !windowed_.empty() ? window_page_ : page_;
    return {tokens(),     pairs_,      adjacent_, cosines_.data() + first, sines_.data() + first,
            page.data(), slot_.data()};
}

}  // namespace longspan
