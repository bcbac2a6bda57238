#include "lookup.hpp"

#include "half.hpp"

#ifdef ACTLAS_X86
#include <immintrin.h>
#endif

namespace actlas {
namespace {

float number(const void *from, std::size_t i, bool half) {
    if (!half) return static_cast<const float *>(from)[i];
    return half_to_float(static_cast<const std::uint16_t *>(from)[i]);
}

// Tables of 256 sums for eight inputs: a row's byte of signs is the key.
void plain_lookup(const Binary &w, const float *x, float *y, std::size_t begin, std::size_t end) {
    const std::size_t blocks = w.blocks();
    std::vector<float> table(4 * 256);
    for (std::size_t run = 0; run < w.columns / 32; ++run) {
        float total = 0.0f;
        for (std::size_t part = 0; part < 4; ++part) {
            float *t = &table[256 * part];
            const float *in = x + 32 * run + 8 * part;
            t[0] = 0.0f;
            for (std::size_t j = 0; j < 8; ++j) t[0] -= in[j];
            total -= t[0];
            for (std::size_t j = 0; j < 8; ++j) {  // with bit j: without it, plus twice the input
                for (std::size_t k = 0; k < std::size_t{1} << j; ++k) t[k + (std::size_t{1} << j)] = t[k] + 2.0f * in[j];
            }
        }
        const std::size_t g = 32 * run / w.group;
        for (std::size_t b = begin; b < end; ++b) {
            for (std::size_t i = 0; i < w.bits; ++i) {
                const std::uint32_t *words = w.signs + ((run * blocks + b) * w.bits + i) * 16;
                for (std::size_t r = 0; r < 16; ++r) {
                    const std::uint32_t key = words[r];
                    const float sum = (table[key & 255] + table[256 + (key >> 8 & 255)]) +
                                      (table[512 + (key >> 16 & 255)] + table[768 + (key >> 24)]);
                    y[16 * b + r] += number(w.alpha, ((g * blocks + b) * w.bits + i) * 16 + r, w.half) * sum;
                }
            }
            if (w.offset) {
                for (std::size_t r = 0; r < 16; ++r) {
                    y[16 * b + r] += number(w.offset, (g * blocks + b) * 16 + r, w.half) * total;
                }
            }
        }
    }
}

#ifdef ACTLAS_X86

#define ACTLAS_LOOKUP5 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c")))
#define ACTLAS_LOOKUP2 __attribute__((target("avx2,fma,f16c")))

bool has_half_floats() {
    static const bool found = __builtin_cpu_supports("f16c");
    return found;
}

// The sums of four inputs for the keys `from`, `from` + 1, ...: lane k adds input j where bit j of its key is set,
// and takes it away elsewhere.
inline void fill_table(float *table, std::size_t keys, const float *x) {
    for (std::size_t k = 0; k < keys; ++k) {
        float sum = 0.0f;
        for (std::size_t j = 0; j < 4; ++j) sum += k >> j & 1 ? x[j] : -x[j];
        table[k] = sum;
    }
}

ACTLAS_LOOKUP5 inline __m512 sixteen(const void *from, std::size_t i, bool half) {
    if (!half) return _mm512_loadu_ps(static_cast<const float *>(from) + i);
    return _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i *>(static_cast<const std::uint16_t *>(from) + i)));
}

// Sixteen sums are one register, and one instruction looks up sixteen rows in it. The tables of 32 inputs stay
// in eight registers while all rows pass.
ACTLAS_LOOKUP5 void lookup_avx512(const Binary &w, const float *x, float *y, std::size_t begin, std::size_t end) {
    const std::size_t blocks = w.blocks();
    for (std::size_t run = 0; run < w.columns / 32; ++run) {
        __m512 table[8];
        alignas(64) float sums[16];
        float total = 0.0f;
        for (std::size_t part = 0; part < 8; ++part) {
            fill_table(sums, 16, x + 32 * run + 4 * part);
            table[part] = _mm512_load_ps(sums);
            total += sums[15];
        }
        const std::size_t g = 32 * run / w.group;
        for (std::size_t b = begin; b < end; ++b) {
            __m512 out = _mm512_loadu_ps(y + 16 * b);
            for (std::size_t i = 0; i < w.bits; ++i) {
                const std::size_t at = ((g * blocks + b) * w.bits + i) * 16;
                const __m512i key = _mm512_loadu_si512(w.signs + ((run * blocks + b) * w.bits + i) * 16);
                // The lookup reads the lowest four bits of a key only.
                __m512 first = _mm512_permutexvar_ps(key, table[0]);
                __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(key, 4), table[1]);
                first = _mm512_add_ps(first, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 8), table[2]));
                second = _mm512_add_ps(second, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 12), table[3]));
                first = _mm512_add_ps(first, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 16), table[4]));
                second = _mm512_add_ps(second, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 20), table[5]));
                first = _mm512_add_ps(first, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 24), table[6]));
                second = _mm512_add_ps(second, _mm512_permutexvar_ps(_mm512_srli_epi32(key, 28), table[7]));
                out = _mm512_fmadd_ps(_mm512_add_ps(first, second), sixteen(w.alpha, at, w.half), out);
            }
            if (w.offset) {
                const std::size_t at = (g * blocks + b) * 16;
                out = _mm512_fmadd_ps(_mm512_set1_ps(total), sixteen(w.offset, at, w.half), out);
            }
            _mm512_storeu_ps(y + 16 * b, out);
        }
    }
}

ACTLAS_LOOKUP2 inline __m256 eight(const void *from, std::size_t i, bool half) {
    if (!half) return _mm256_loadu_ps(static_cast<const float *>(from) + i);
    return _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const std::uint16_t *>(from) + i)));
}

// A register of eight sums: those of keys with the fourth bit set are the negatives of the opposite keys.
ACTLAS_LOOKUP2 void lookup_avx2(const Binary &w, const float *x, float *y, std::size_t begin, std::size_t end) {
    const std::size_t blocks = w.blocks();
    const __m256i top = _mm256_set1_epi32(static_cast<std::int32_t>(0x80000000u));
    for (std::size_t run = 0; run < w.columns / 32; ++run) {
        __m256 table[8];
        alignas(32) float sums[16];
        float total = 0.0f;
        for (std::size_t part = 0; part < 8; ++part) {
            fill_table(sums, 16, x + 32 * run + 4 * part);
            table[part] = _mm256_load_ps(sums);
            total += sums[15];
        }
        const std::size_t g = 32 * run / w.group;
        for (std::size_t half = 2 * begin; half < 2 * end; ++half) {
            const std::size_t b = half / 2, lane = 8 * (half % 2);
            __m256 out = _mm256_loadu_ps(y + 8 * half);
            for (std::size_t i = 0; i < w.bits; ++i) {
                const std::size_t at = ((g * blocks + b) * w.bits + i) * 16 + lane;
                const std::uint32_t *words = w.signs + ((run * blocks + b) * w.bits + i) * 16 + lane;
                __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words));
                __m256 sum = _mm256_setzero_ps();
                for (std::size_t part = 0; part < 8; ++part) {
                    const __m256i turned = _mm256_srai_epi32(_mm256_slli_epi32(key, 28), 31);
                    const __m256 found = _mm256_permutevar8x32_ps(table[part], _mm256_xor_si256(key, turned));
                    sum = _mm256_add_ps(sum, _mm256_xor_ps(found, _mm256_castsi256_ps(_mm256_and_si256(turned, top))));
                    key = _mm256_srli_epi32(key, 4);
                }
                out = _mm256_fmadd_ps(sum, eight(w.alpha, at, w.half), out);
            }
            if (w.offset) {
                const std::size_t at = (g * blocks + b) * 16 + lane;
                out = _mm256_fmadd_ps(_mm256_set1_ps(total), eight(w.offset, at, w.half), out);
            }
            _mm256_storeu_ps(y + 8 * half, out);
        }
    }
}

#endif

}  // namespace

void lookup(const Binary &w, const float *x, float *y, std::size_t begin, std::size_t end, Level level) {
    level = std::min(level, best_level());
    std::fill(y + 16 * begin, y + 16 * end, 0.0f);
#ifdef ACTLAS_X86
    if (level == Level::avx512 && has_half_floats()) return lookup_avx512(w, x, y, begin, end);
    if (level == Level::avx2 && has_half_floats()) return lookup_avx2(w, x, y, begin, end);
#endif
    plain_lookup(w, x, y, begin, end);
}

}  // namespace actlas
