#include "weight.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "numbers.h"
#include "pool.h"

namespace longspan {
namespace {

// One row's unit in the open: stored values in column order, scales and minima by group.
struct Row {
    uint8_t q[256];
    uint8_t scale[16], minimum[16];
    uint16_t d, d_minimum;
};

uint16_t half_at(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

// The low and the high nibbles of n bytes: two runs of n values.
void nibbles(const uint8_t* from, int n, uint8_t* low, uint8_t* high) {
    for (int i = 0; i < n; ++i) {
        low[i] = from[i] & 15;
        high[i] = from[i] >> 4;
    }
}

// Scales and minima of Q4_K and Q5_K: eight of each, 6 bits, in 12 bytes.
void six_bit_pairs(const uint8_t* s, Row& row) {
    for (int j = 0; j < 4; ++j) {
        row.scale[j] = s[j] & 63;
        row.minimum[j] = s[j + 4] & 63;
        row.scale[j + 4] = static_cast<uint8_t>((s[j + 8] & 15) | (s[j] >> 6) << 4);
        row.minimum[j + 4] = static_cast<uint8_t>((s[j + 8] >> 4) | (s[j + 4] >> 6) << 4);
    }
}

// Reads a row's unit of a packed format as ggml-common.h and gguf-py's quants.py lay it out.
template <Layout F>
void open_unit(const uint8_t* b, Row& row) {
    if constexpr (F.type == Type::Q8_0) {
        row.d = half_at(b);
        for (int k = 0; k < 32; ++k) row.q[k] = b[2 + k] ^ 0x80;  // biased by 128
    } else if constexpr (F.type == Type::Q4_0 || F.type == Type::IQ4_NL) {
        row.d = half_at(b);
        nibbles(b + 2, 16, row.q, row.q + 16);
    } else if constexpr (F.type == Type::Q4_1) {
        row.d = half_at(b);
        row.d_minimum = half_at(b + 2);
        nibbles(b + 4, 16, row.q, row.q + 16);
    } else if constexpr (F.type == Type::Q5_0 || F.type == Type::Q5_1) {
        constexpr int high_at = F.type == Type::Q5_0 ? 2 : 4;
        row.d = half_at(b);
        row.d_minimum = half_at(b + 2);
        nibbles(b + high_at + 4, 16, row.q, row.q + 16);
        for (int k = 0; k < 32; ++k)
            row.q[k] |= static_cast<uint8_t>((b[high_at + k / 8] >> (k % 8) & 1) << 4);
    } else if constexpr (F.type == Type::Q2_K) {
        // | 16 x (4-bit scale, 4-bit minimum) | 64 bytes: four values of 2 bits, 32 columns apart |
        std::memcpy(row.scale, b, 16);
        for (int half = 0; half < 2; ++half)
            for (int part = 0; part < 4; ++part)
                for (int i = 0; i < 32; ++i)
                    row.q[half * 128 + part * 32 + i] = b[16 + half * 32 + i] >> (2 * part) & 3;
        row.d = half_at(b + 80);
        row.d_minimum = half_at(b + 82);
    } else if constexpr (F.type == Type::Q3_K) {
        // | 32 bytes of third bits | 64 bytes of low bits | 16 scales of 6 bits in 12 bytes | d |
        for (int half = 0; half < 2; ++half)
            for (int part = 0; part < 4; ++part)
                for (int i = 0; i < 32; ++i) {
                    const int low = b[32 + half * 32 + i] >> (2 * part) & 3;
                    const int high = b[i] >> (half * 4 + part) & 1;
                    row.q[half * 128 + part * 32 + i] = static_cast<uint8_t>(low | high << 2);
                }
        const uint8_t* s = b + 96;
        for (int j = 0; j < 16; ++j) {
            const int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4;
            const int high = s[8 + j % 4] >> (j / 4 * 2) & 3;
            row.scale[j] = static_cast<uint8_t>((low | high << 4) - 32);
        }
        row.d = half_at(b + 108);
    } else if constexpr (F.type == Type::Q4_K || F.type == Type::Q5_K) {
        // | d | dmin | 12 bytes of scales | Q5_K: 32 bytes of fifth bits | 4 x 32 nibble pairs |
        row.d = half_at(b);
        row.d_minimum = half_at(b + 2);
        six_bit_pairs(b + 4, row);
        const uint8_t* low = b + (F.type == Type::Q5_K ? 48 : 16);
        for (int pair = 0; pair < 4; ++pair)
            nibbles(low + pair * 32, 32, row.q + pair * 64, row.q + pair * 64 + 32);
        if constexpr (F.type == Type::Q5_K)
            for (int g = 0; g < 8; ++g)
                for (int i = 0; i < 32; ++i)
                    row.q[g * 32 + i] |= static_cast<uint8_t>((b[16 + i] >> g & 1) << 4);
    } else if constexpr (F.type == Type::Q6_K) {
        // | 128 bytes of nibbles | 64 bytes of upper bit pairs | 16 scales | d |, in two halves
        for (int half = 0; half < 2; ++half) {
            const uint8_t *low = b + half * 64, *high = b + 128 + half * 32;
            uint8_t* q = row.q + half * 128;
            nibbles(low, 64, q, q + 64);
            for (int part = 0; part < 4; ++part)
                for (int i = 0; i < 32; ++i)
                    q[part * 32 + i] |= static_cast<uint8_t>((high[i] >> (2 * part) & 3) << 4);
        }
        std::memcpy(row.scale, b + 192, 16);
        row.d = half_at(b + 208);
    } else {
        static_assert(F.type == Type::IQ4_XS);
        // | d | upper scale bits, 2 a group | lower scale bits, 4 a group | 8 x 16 nibble pairs |
        row.d = half_at(b);
        const int upper = half_at(b + 2);
        for (int g = 0; g < 8; ++g) {
            const int low = b[4 + g / 2] >> (g % 2 * 4) & 15;
            row.scale[g] = static_cast<uint8_t>((low | (upper >> (2 * g) & 3) << 4) - 32);
            nibbles(b + 8 + g * 16, 16, row.q + g * 32, row.q + g * 32 + 16);
        }
    }
}

// Packs 32 values of `bits` bits into `bits` words: place() of layout.h, the other way round.
template <int BITS>
void close_chunk(const uint8_t* q, uint32_t* words) {
    constexpr int whole = 32 / BITS;
    for (int w = 0; w < BITS; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < whole; ++i)
            word |= static_cast<uint32_t>(q[w * whole + i]) << (i * BITS);
        words[w] = word;
    }
    const uint32_t a = q[30], z = q[31];
    if constexpr (BITS == 3) {
        words[0] |= a << 30;
        words[1] |= (a >> 2) << 30 | (z >> 2) << 31;
        words[2] |= z << 30;
    } else if constexpr (BITS == 5) {
        words[0] |= a << 30;
        words[1] |= (a >> 2 & 3) << 30;
        words[2] |= (a >> 4) << 30 | (z >> 4) << 31;
        words[3] |= z << 30;
        words[4] |= (z >> 2 & 3) << 30;
    } else if constexpr (BITS == 6) {
        words[0] |= a << 30;
        words[1] |= (a >> 2 & 3) << 30;
        words[2] |= (a >> 4) << 30;
        words[3] |= z << 30;
        words[4] |= (z >> 2 & 3) << 30;
        words[5] |= (z >> 4) << 30;
    }
}

// One plane of close_planes: bits [from, from + WIDTH) of 32 values, four side by side in a word.
template <int WIDTH>
void close_plane(const uint32_t* steps, int from, uint32_t* words) {
    constexpr int a_word = 8 / WIDTH;
    constexpr uint32_t field = ((1u << WIDTH) - 1) * 0x01010101u;
    for (int w = 0; w < WIDTH; ++w) {
        words[w] = 0;
        for (int i = 0; i < a_word; ++i)
            words[w] |= (steps[w * a_word + i] >> from & field) << (i * WIDTH);
    }
}

// The same in Order::Bytes: 32 values as planes.
template <Layout F>
void close_planes(const uint8_t* q, uint32_t* words) {
    constexpr Planes p = planes(F);
    uint32_t steps[CHUNK / STEP];
    std::memcpy(steps, q, sizeof steps);
    close_plane<p.low>(steps, 0, words);
    if constexpr (p.high != 0) close_plane<p.high>(steps, p.low, words + p.low);
}

void put_half(uint8_t* unit, int at, int lane, uint16_t half) {
    std::memcpy(unit + at + lane * 2, &half, 2);
}

// One row's unit into its lane of a packed one.
template <Layout F>
void pack_packed(const uint8_t* from, uint8_t* unit, int lane, Order order) {
    Row row;
    open_unit<F>(from, row);
    for (int c = 0; c < F.chunks; ++c) {
        uint32_t words[F.bits];
        if (order == Order::Bytes) close_planes<F>(row.q + c * CHUNK, words);
        else if constexpr (is_packed(F)) close_chunk<F.bits>(row.q + c * CHUNK, words);
        for (int w = 0; w < F.bits; ++w)
            std::memcpy(unit + c * F.chunk_bytes() + (w * LANES + lane) * 4, &words[w], 4);
    }
    if constexpr (F.shared_d()) {
        for (int g = 0; g < F.chunks * F.groups; ++g) {
            unit[F.scales_at() + g * LANES + lane] = row.scale[g];
            if constexpr (F.minimum != 0) unit[F.minima_at() + g * LANES + lane] = row.minimum[g];
        }
        put_half(unit, F.d_at(), lane, row.d);
        // Minima are subtracted in the K formats: the sign goes into d, exactly.
        if constexpr (F.has_minimum())
            put_half(unit, F.d_at() + 2 * LANES, lane, row.d_minimum ^ 0x8000u);
    } else {
        put_half(unit, F.scales_at(), lane, row.d);
        if constexpr (F.has_minimum()) put_half(unit, F.minima_at(), lane, row.d_minimum);
    }
}

// `columns` whole values of a wide format, column by column.
template <Layout F>
void pack_wide(const uint8_t* from, uint8_t* unit, int lane, int columns) {
    constexpr int bytes = F.bits / 8;
    if constexpr (F.type == Type::Q8_0) {
        put_half(unit, F.scales_at(), lane, half_at(from));
        from += 2;
    }
    for (int k = 0; k < columns; ++k)
        std::memcpy(unit + (k * LANES + lane) * bytes, from + k * bytes, bytes);
}

template <Layout F>
void pack_panel(const Part& part, int panel, const std::vector<Rows>& tensors, size_t row_bytes) {
    int first = panel * LANES;
    const Rows* tensor = tensors.data();
    for (; first >= tensor->count; ++tensor) first -= tensor->count;
    const int rows = std::min(LANES, tensor->count - first);
    for (int u = 0; u < part.units(); ++u) {
        uint8_t* unit = part.panel(panel) + static_cast<size_t>(u) * part.unit_stride(panel);
        for (int lane = 0; lane < rows; ++lane) {
            const uint8_t* from = tensor->file + static_cast<size_t>(first + lane) * row_bytes +
                                  static_cast<size_t>(u) * F.block;
            if (is_packed(F) || (is_quantised(F) && part.packing.order == Order::Bytes)) {
                if constexpr (is_quantised(F)) pack_packed<F>(from, unit, lane, part.packing.order);
            } else if constexpr (!is_packed(F)) {
                pack_wide<F>(from, unit, lane, std::min(CHUNK, part.cols - u * CHUNK));
            }
        }
    }
}

}  // namespace

void Weight::append(int type, const std::vector<Rows>& tensors, size_t row_bytes) {
    int rows = 0;
    bool whole = true;
    for (const Rows& tensor : tensors) {
        whole = whole && tensor.count > 0 && rows % LANES == 0;
        rows += tensor.count;
    }
    if (!whole) throw std::invalid_argument("a tensor that does not end with a panel");
    const bool known = with_layout(type, [&]<Layout F>() {
        constexpr int unit = F.type == Type::Q8_0 || is_packed(F) ? F.columns() : 1;
        constexpr int unit_bytes = unit == 1 ? F.bits / 8 : F.block;
        if (rows < 1 || cols_ < 1 || cols_ % unit ||
            row_bytes != static_cast<size_t>(cols_ / unit) * unit_bytes)
            throw std::invalid_argument("a row's bytes do not fit its columns");
        Part part{F, packing_, rows, cols_, {}};
        part.memory = Memory(part.panels() * part.panel_bytes());
        pool().run(part.panels(),
                   [&](int panel) { pack_panel<F>(part, panel, tensors, row_bytes); });
        parts_.push_back(std::move(part));
        rows_ += rows;
    });
    if (!known) throw std::invalid_argument("a tensor type that is not computed");
}

size_t Weight::bytes() const {
    size_t total = 0;
    for (const Part& part : parts_) total += part.panels() * part.panel_bytes();
    return total;
}

}  // namespace longspan
