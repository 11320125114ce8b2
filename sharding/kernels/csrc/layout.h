// How packed weights lie in memory.
//
// A matrix [rows, cols] is cut into panels of 16 rows. A panel is a run of units along the columns,
// a unit is 1 or 8 chunks of 32 columns followed by their scales:
//
//     panel   | unit | unit | ...
//     unit    | chunk | ... | chunk | scales | minima | d | dmin |
//
// A chunk of b-bit integers is a run of 32-bit words, one word of each of the 16 rows after the
// other, so that one vector register holds the same columns of 16 rows. What the words hold is a
// matter of the arithmetic that reads them, which an instruction set has one of:
//
// Order::Values, for arithmetic value by value. A word holds floor(32 / b) whole values from its
// low bits up; what remains of the words of a chunk holds the last values:
//
//     2 bits   2 words of 16 values                            (Q2_K)
//     3 bits   3 words of 10 values, 2 in the spare bits       (Q3_K)
//     4 bits   4 words of 8 values                             (Q4_0 Q4_1 Q4_K IQ4_NL IQ4_XS)
//     5 bits   5 words of 6 values, 2 in the spare bits        (Q5_0 Q5_1 Q5_K)
//     6 bits   6 words of 5 values, 2 in the spare bits        (Q6_K)
//
// Wider values (Q8_0, F16, BF16, F32) lie column by column, 16 rows side by side.
//
// Order::Bytes, for products of four bytes at once: 8 steps of 4 columns, one column in each byte
// of a word. A chunk is a run of planes, each a part of the bits of all values; a byte of a plane
// of w bits holds the parts of 8 / w steps, from its low bits up:
//
//     2 bits   2            5 bits   4 + 1            8 bits   8, biased by 128 (Q8_0)
//     3 bits   2 + 1        6 bits   4 + 2
//     4 bits   4            floats as above
//
// Rows beyond the matrix are zero, and so are columns beyond a float matrix.
#pragma once

#include <cstddef>
#include <cstdint>

namespace longspan {

constexpr int LANES = 16;
constexpr int CHUNK = 32;

enum class Order { Values, Bytes };

// GGUF's numbers.
enum class Type : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
    BF16 = 30,
};

// bits      of a value as stored
// chunks    of 32 columns in a unit
// groups    in a chunk, each with its own scale
// scale     bytes of a group's scale: 0 none, 1 an integer times the unit's d, 2 FP16
// minimum   the same for its minimum (Q2_K keeps scale and minimum in one byte: 4 bits each)
// offset    what is subtracted from a stored value
// block     bytes of a row's unit in the file (of a chunk, for the float types)
struct Layout {
    Type type;
    int bits, chunks, groups, scale, minimum, offset, block;

    constexpr int chunk_bytes() const { return bits * CHUNK * LANES / 8; }
    constexpr int scales_at() const { return chunks * chunk_bytes(); }
    constexpr int minima_at() const { return scales_at() + chunks * groups * scale * LANES; }
    constexpr int d_at() const { return minima_at() + chunks * groups * minimum * LANES; }
    constexpr bool shared_d() const { return scale == 1; }
    constexpr bool has_minimum() const { return minimum != 0 || type == Type::Q2_K; }
    constexpr int unit_bytes() const {
        return d_at() + (shared_d() ? (has_minimum() ? 4 : 2) * LANES : 0);
    }
    constexpr int columns() const { return chunks * CHUNK; }
};

//                            type           bits ch gr sc mi off block
constexpr Layout F32{Type::F32, 32, 1, 1, 0, 0, 0, 128};
constexpr Layout F16{Type::F16, 16, 1, 1, 0, 0, 0, 64};
constexpr Layout BF16{Type::BF16, 16, 1, 1, 0, 0, 0, 64};
constexpr Layout Q4_0{Type::Q4_0, 4, 1, 1, 2, 0, 8, 18};
constexpr Layout Q4_1{Type::Q4_1, 4, 1, 1, 2, 2, 0, 20};
constexpr Layout Q5_0{Type::Q5_0, 5, 1, 1, 2, 0, 16, 22};
constexpr Layout Q5_1{Type::Q5_1, 5, 1, 1, 2, 2, 0, 24};
constexpr Layout Q8_0{Type::Q8_0, 8, 1, 1, 2, 0, 0, 34};
constexpr Layout IQ4_NL{Type::IQ4_NL, 4, 1, 1, 2, 0, 0, 18};
constexpr Layout Q2_K{Type::Q2_K, 2, 8, 2, 1, 0, 0, 84};
constexpr Layout Q3_K{Type::Q3_K, 3, 8, 2, 1, 0, 4, 110};
constexpr Layout Q4_K{Type::Q4_K, 4, 8, 1, 1, 1, 0, 144};
constexpr Layout Q5_K{Type::Q5_K, 5, 8, 1, 1, 1, 0, 176};
constexpr Layout Q6_K{Type::Q6_K, 6, 8, 2, 1, 0, 32, 210};
constexpr Layout IQ4_XS{Type::IQ4_XS, 4, 8, 1, 1, 0, 0, 136};

// The values that IQ4_NL and IQ4_XS index (ggml-common.h, kvalues_iq4nl).
constexpr float NONLINEAR[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                 1,    13,   25,  38,  53,  69,  89,  113};

constexpr bool is_nonlinear(const Layout& f) {
    return f.type == Type::IQ4_NL || f.type == Type::IQ4_XS;
}
constexpr bool is_packed(const Layout& f) { return f.bits < 8; }
constexpr bool is_quantised(const Layout& f) { return f.scale != 0; }

// Order::Bytes: the widths of a format's planes, the second 0 where there is one.
struct Planes {
    int low, high;
};
constexpr Planes planes(const Layout& f) {
    const int low = f.bits == 8 ? 8 : f.bits >= 4 ? 4 : 2;
    return {low, f.bits - low};
}
// What is subtracted from a value of Order::Bytes: Q8_0 is stored with a bias, and so are the
// entries of the table that a nonlinear format's values are replaced by.
constexpr int bias(const Layout& f) {
    return f.type == Type::Q8_0 || is_nonlinear(f) ? 128 : f.offset;
}
constexpr int STEP = 4;  // columns that meet in a product of bytes

// Where value k of a chunk lies: word and bit, or the spare bits.
struct Place {
    int word, bit;
    bool spare;
};
constexpr Place place(int bits, int k) {
    const int whole = 32 / bits;  // values that a word holds
    if (k >= bits * whole) return {k - bits * whole, 0, true};
    return {k / whole, k % whole * bits, false};
}

// Calls use.operator()<F>() with the layout of a GGUF type; false if it is not computed.
template <class Use>
bool with_layout(int type, Use use) {
    switch (static_cast<Type>(type)) {
#define LONGSPAN_CASE(F)              \
    case Type::F:                     \
        use.template operator()<F>(); \
        return true;
        LONGSPAN_CASE(F32)
        LONGSPAN_CASE(F16)
        LONGSPAN_CASE(BF16)
        LONGSPAN_CASE(Q4_0)
        LONGSPAN_CASE(Q4_1)
        LONGSPAN_CASE(Q5_0)
        LONGSPAN_CASE(Q5_1) LONGSPAN_CASE(Q8_0) LONGSPAN_CASE(IQ4_NL) LONGSPAN_CASE(Q2_K)
            LONGSPAN_CASE(Q3_K) LONGSPAN_CASE(Q4_K) LONGSPAN_CASE(Q5_K) LONGSPAN_CASE(Q6_K)
                LONGSPAN_CASE(IQ4_XS)
#undef LONGSPAN_CASE
    }
    return false;
}

}  // namespace longspan
