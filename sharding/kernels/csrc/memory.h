// Memory for packed weights, in large pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace longspan {

// Zero at first, aligned to a page. Cut from regions of 256 MiB one piece after the other, so that
// matrices smaller than a large page lie in one too: a token reads all of them, more small pages
// than a processor keeps translations of (Zen 3, SmolLM2's matrices: 8% to 10% more bytes a
// second). A region goes back to the system with its last piece. Any thread.
class Memory {
  public:
    Memory() = default;
    // Throws std::bad_alloc.
    explicit Memory(size_t bytes);
    uint8_t* data() const { return piece_.get(); }

  private:
    std::shared_ptr<uint8_t> piece_;
};

}  // namespace longspan
