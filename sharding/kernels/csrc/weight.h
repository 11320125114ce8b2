// A packed matrix and how it is filled from a file's bytes. See layout.h for what lies where.
#pragma once

#include <cstdint>
#include <vector>

#include "layout.h"
#include "memory.h"

namespace longspan {

// How an instruction set wants weights packed. `abreast` panels have their units in turn, so that
// one stream of memory feeds as many sums: as many as the kernel for one token takes at once, as it
// would skip the others and fetch them ahead for nothing (four for AVX2's two: a third fewer tokens
// a second on Zen 3).
struct Packing {
    Order order;
    int abreast;
};

// Three instead of four where that gives two threads equally many blocks and four does not.
constexpr int block_panels_for(int panels, int abreast) {
    const bool even = (panels + 3) / 4 % 2 == 0;
    return abreast == 4 && !even && panels % 6 == 0 ? 3 : abreast;
}

// Rows of one format. Panels come in blocks (the last may be smaller); a block holds unit 0 of its
// panels, then unit 1 of each, and so on.
struct Part {
    Layout layout;
    Packing packing;
    int rows, cols;
    Memory memory;

    int panels() const { return (rows + LANES - 1) / LANES; }
    int units() const { return (cols + layout.columns() - 1) / layout.columns(); }
    int padded_cols() const { return units() * layout.columns(); }
    size_t panel_bytes() const { return static_cast<size_t>(units()) * layout.unit_bytes(); }
    int block_panels() const { return block_panels_for(panels(), packing.abreast); }
    int blocks() const { return (panels() + block_panels() - 1) / block_panels(); }
    // Unit 0 of a panel, and the bytes from one of its units to the next.
    uint8_t* panel(int at) const {
        const int first = at / block_panels() * block_panels();
        return memory.data() + static_cast<size_t>(first) * panel_bytes() +
               static_cast<size_t>(at - first) * layout.unit_bytes();
    }
    size_t unit_stride(int panel) const {
        const int first = panel / block_panels() * block_panels(), left = panels() - first;
        const int width = left < block_panels() ? left : block_panels();
        return static_cast<size_t>(width) * layout.unit_bytes();
    }
};

// A tensor's rows in a file.
struct Rows {
    int count;
    const uint8_t* file;
};

// Matrices of equal columns, stacked by rows. Packed once, read by any thread afterwards.
class Weight {
  public:
    Weight(int cols, Packing packing) : cols_(cols), packing_(packing) {}
    Weight(const Weight&) = delete;
    Weight& operator=(const Weight&) = delete;

    // Packs tensors of one type as one part, as the file has their rows, each `row_bytes` long.
    // Throws std::invalid_argument for a type that is not computed, a row of another length, or a
    // tensor but the last whose rows are not whole panels.
    void append(int type, const std::vector<Rows>& tensors, size_t row_bytes);

    int rows() const { return rows_; }
    int cols() const { return cols_; }
    Order order() const { return packing_.order; }
    size_t bytes() const;
    const std::vector<Part>& parts() const { return parts_; }

  private:
    int rows_ = 0;
    const int cols_;
    const Packing packing_;
    std::vector<Part> parts_;
};

}  // namespace longspan
