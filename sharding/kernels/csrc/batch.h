// A batch as attention sees it: which requests its tokens belong to, where they go, how they turn.
#pragma once

#include <vector>

#include "ops.h"

namespace longspan {

class Batch {
  public:
    // `frequencies`: radians a position, [rotations, pairs]; cosines and sines of a rotation are
    // times its gain, as many as there are rotations. Segments follow one another; their page tables
    // belong to the caller.
    // `window_tables`: the page tables of layers with a window; the segments' own if it is empty.
    Batch(std::vector<Segment> segments, const std::vector<const int64_t*>& window_tables,
          const double* frequencies, const std::vector<double>& gains, int pairs, bool adjacent);
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    // As layers with that window see it, 0 for none.
    const std::vector<Segment>& segments(int window) const {
        return window && !windowed_.empty() ? windowed_ : segments_;
    }
    int tokens() const { return static_cast<int>(page_.size()); }
    int rotations() const { return rotations_; }
    // By that rotation, for layers with that window.
    Turn turn(int rotation, int window) const;

  private:
    std::vector<Segment> segments_, windowed_;
    std::vector<float> cosines_, sines_;
    std::vector<int64_t> page_, window_page_, slot_;
    int rotations_, pairs_;
    bool adjacent_;
};

}  // namespace longspan
