// float16 and the 8-bit floats as float32.
#pragma once

#include "common.hpp"

namespace actlas {

inline float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t exponent = (h >> 10) & 31u, fraction = h & 1023u;
    if (exponent == 0) {
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -value : value;
    }
    const std::uint32_t bits =
        sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Bytes as integers and back, by way of 16 bits: GCC takes a direct conversion apart, lane by lane.
template <std::size_t lanes> ACTLAS_INLINE typename Vec<lanes>::Ints widen_bytes(const void *from) {
    typedef std::int16_t Shorts __attribute__((vector_size(lanes * 2)));
    typename Vec<lanes>::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, Shorts), typename Vec<lanes>::Ints);
}

template <std::size_t lanes> ACTLAS_INLINE void store_bytes(std::int8_t *to, typename Vec<lanes>::Ints values) {
    typedef std::int16_t Shorts __attribute__((vector_size(lanes * 2)));
    store(to, __builtin_convertvector(__builtin_convertvector(values, Shorts), typename Vec<lanes>::Bytes));
}

// Finite values of `exponent` exponent bits, 7 - exponent mantissa bits, and the usual bias. An exponent of 0
// (subnormal) is read as 1 with an implied one, which is then taken away: no step of it is subnormal in float32.
template <std::size_t lanes, int exponent>
ACTLAS_INLINE void widen_float8(typename Vec<lanes>::Floats &v, const std::uint8_t *from) {
    using Ints = typename Vec<lanes>::Ints;
    constexpr int bias = (1 << (exponent - 1)) - 1, mantissa = 7 - exponent, shift = 23 - mantissa;
    constexpr std::int32_t one = (127 - bias) << 23, least = (128 - bias) << 23;
    const Ints wide = widen_bytes<lanes>(from), size = (wide & 127) << shift;
    const Ints below = size < (1 << 23), sign = wide & static_cast<std::int32_t>(0x80000000u);
    typename Vec<lanes>::Floats a;
    const Ints bits = size + one + (below & (1 << 23));
    std::memcpy(&a, &bits, sizeof a);
    float unit;
    std::memcpy(&unit, &least, 4);
    typename Vec<lanes>::Floats taken = typename Vec<lanes>::Floats{} + unit;
    Ints taken_bits;
    std::memcpy(&taken_bits, &taken, sizeof taken);
    taken_bits &= below;
    std::memcpy(&taken, &taken_bits, sizeof taken);
    a -= taken;
    Ints out;
    std::memcpy(&out, &a, sizeof a);
    out |= sign;
    std::memcpy(&v, &out, sizeof v);
}

template <std::size_t lanes> ACTLAS_INLINE void widen_bfloat16(typename Vec<lanes>::Floats &v, const std::uint16_t *from) {
    typename Vec<lanes>::Halves half;
    load(half, from);
    const typename Vec<lanes>::Bits bits = __builtin_convertvector(half, typename Vec<lanes>::Bits) << 16;
    std::memcpy(&v, &bits, sizeof v);
}

}  // namespace actlas
