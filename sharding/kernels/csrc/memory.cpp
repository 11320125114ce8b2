#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace longspan {
namespace {

constexpr size_t PAGE_BYTES = 4096, LARGE_PAGE = 2u << 20, REGION_BYTES = 256u << 20;

constexpr size_t whole(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

class Region {
  public:
    explicit Region(size_t bytes) : mapped_(whole(bytes, LARGE_PAGE) + LARGE_PAGE) {
        void* p =
            mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        start_ = static_cast<uint8_t*>(p);
        const auto address = reinterpret_cast<uintptr_t>(p);
        next_ = start_ + (whole(address, LARGE_PAGE) - address);
        left_ = mapped_ - LARGE_PAGE;
        // Only a hint: fewer page faults while packing, fewer translations while streaming.
        madvise(next_, left_, MADV_HUGEPAGE);
    }
    ~Region() { munmap(start_, mapped_); }
    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    // The next piece, or null if so much is not left.
    uint8_t* cut(size_t bytes) {
        if (bytes > left_) return nullptr;
        left_ -= bytes;
        next_ += bytes;
        return next_ - bytes;
    }

  private:
    uint8_t *start_, *next_;
    size_t mapped_, left_;
};

}  // namespace

Memory::Memory(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Region> latest;  // alive as long as a piece of it is
    const size_t wanted = whole(bytes, PAGE_BYTES);
    const std::lock_guard lock(mutex);
    std::shared_ptr<Region> region = latest.lock();
    uint8_t* piece = region ? region->cut(wanted) : nullptr;
    if (!piece) {
        region = std::make_shared<Region>(std::max(wanted, REGION_BYTES));
        piece = region->cut(wanted);
        latest = region;
    }
    piece_ = {std::move(region), piece};
}

}  // namespace longspan
