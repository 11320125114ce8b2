// A batch as attention sees it: which requests its tokens belong to, where they go, how they turn.
#pragma once

#include <vector>

#include "ops.h"

namespace longspan {

class Batch {
  public:
    // `frequencies`: radians a position, of each of so many pairs. Segments follow one another;
    // their page tables belong to the caller.
    Batch(std::vector<Segment> segments, const double* frequencies, int pairs, bool adjacent);
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    const std::vector<Segment>& segments() const { return segments_; }
    const Turn& turn() const { return turn_; }

  private:
    std::vector<Segment> segments_;
    std::vector<float> cosines_, sines_;
    std::vector<int64_t> page_, slot_;
    Turn turn_;
};

}  // namespace longspan
