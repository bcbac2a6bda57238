// Bytes times bytes on x86 (AVX-512 VNNI).
#pragma once

#include "common.hpp"

#ifdef ACTLAS_X86
#include <immintrin.h>
#define ACTLAS_VNNI __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma,f16c")))

namespace actlas {

// sums += a * b, unsigned bytes of a with signed of b, four at a time. As an instruction in place: with the
// intrinsic, GCC 12 moves every sum to another register and back in each round of a loop.
ACTLAS_VNNI inline void add_dots(__m512i &sums, __m512i a, __m512i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

ACTLAS_VNNI inline __m512 sixteen_halves(const void *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i *>(from)));
}

ACTLAS_VNNI inline __m512i four_bytes(const std::int8_t *from) {
    std::int32_t word;
    std::memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

}  // namespace actlas
#endif
