// Number formats narrower than float32, and the arrays that kernels work in. No vector code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace longspan {

inline float bits_to_f32(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t f32_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// IEEE 754 binary16, exact.
inline float f16_to_f32(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        const float value = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -value : value;
    }
    if (exponent == 31) return bits_to_f32(sign | 0x7f800000u | fraction << 13);
    return bits_to_f32(sign | (exponent + 112) << 23 | fraction << 13);
}

// To nearest, ties to even; overflow to infinity; a NaN stays one.
inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = f32_to_bits(value), magnitude = bits & 0x7fffffffu;
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the fraction, rounded as float32 rounds, in the last bits.
        const float shifted = bits_to_f32(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (f32_to_bits(shifted) - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + odd - 0x38000000u) >> 13));
}

// Scratch that grows and is never shrunk: a thread keeps one for each purpose. Cache-line aligned.
template <class T>
class Scratch {
  public:
    T* at_least(size_t n) {
        if (n > size_) {
            data_.reset(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64)));
            size_ = data_ ? n : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

}  // namespace longspan
