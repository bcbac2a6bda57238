#include "packed.hpp"

#include <cmath>

#ifdef ACTLAS_X86
#include <immintrin.h>
#define ACTLAS_VNNI __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma,f16c")))
#endif

namespace actlas {
namespace {

float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t exponent = (h >> 10) & 31u, fraction = h & 1023u;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const std::uint32_t bits =
        sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
    std::memcpy(&value, &bits, 4);
    return value;
}

// -- float weights ------------------------------------------------------------------------------------

template <std::size_t lanes, std::size_t tokens>
ACTLAS_INLINE void float_rows(const Linear &w, const Inputs &in, float *out, std::size_t stride,
                              std::size_t begin, std::size_t end, std::size_t token) {
    using Floats = typename Vec<lanes>::Floats;
    const float *weights = static_cast<const float *>(w.data);
    const std::size_t d = w.columns, last = std::min(end * kRows, w.rows);
    constexpr std::size_t at_once = tokens == 1 ? 4 : 2;
    for (std::size_t r = begin * kRows; r < last; r += at_once) {
        const std::size_t count = std::min(at_once, last - r);
        Floats sums[at_once][tokens] = {};
        const float *rows[at_once];
        for (std::size_t i = 0; i < at_once; ++i) rows[i] = weights + (r + std::min(i, count - 1)) * d;
        std::size_t c = 0;
        for (; c + lanes <= d; c += lanes) {
            Floats x[tokens], v;
            for (std::size_t t = 0; t < tokens; ++t) load(x[t], in.x + (token + t) * d + c);
            for (std::size_t i = 0; i < at_once; ++i) {
                load(v, rows[i] + c);
                for (std::size_t t = 0; t < tokens; ++t) sums[i][t] += v * x[t];
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t t = 0; t < tokens; ++t) {
                float total = 0.0f;
                for (std::size_t l = 0; l < lanes; ++l) total += sums[i][t][l];
                for (std::size_t k = c; k < d; ++k) total += rows[i][k] * in.x[(token + t) * d + k];
                out[(token + t) * stride + r + i] = total + (w.bias ? w.bias[r + i] : 0.0f);
            }
        }
    }
}

// Several tokens go through the weights block by block, so that each block is read from memory once.
template <std::size_t lanes>
ACTLAS_INLINE void float_linear(const Linear &w, const Inputs &in, float *out, std::size_t stride,
                                std::size_t begin, std::size_t end) {
    if (in.tokens == 1) {
        float_rows<lanes, 1>(w, in, out, stride, begin, end, 0);
        return;
    }
    for (std::size_t b = begin; b < end; ++b) {
        std::size_t t = 0;
        for (; t + 4 <= in.tokens; t += 4) float_rows<lanes, 4>(w, in, out, stride, b, b + 1, t);
        for (; t < in.tokens; ++t) float_rows<lanes, 1>(w, in, out, stride, b, b + 1, t);
    }
}
ACTLAS_FOR_LEVELS(float_linear,
                  (const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                   std::size_t end),
                  (w, in, out, stride, begin, end))

// -- packed weights: a plain loop ---------------------------------------------------------------------

void packed_plain(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end) {
    const bool four = w.format == Format::q4;
    const std::size_t size = four ? kQ4Block : kQ8Block, groups = w.columns / kGroup;
    const auto *data = static_cast<const std::uint8_t *>(w.data);
    for (std::size_t b = begin; b < end; ++b) {
        float sums[kMostTokens][kRows] = {};
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint8_t *p = data + (b * groups + g) * size;
            std::uint16_t scales[kRows], minima[kRows] = {};
            std::memcpy(scales, p + (four ? 256 : 512), sizeof scales);
            if (four) std::memcpy(minima, p + 288, sizeof minima);
            for (std::size_t t = 0; t < in.tokens; ++t) {
                const std::size_t place = t * w.columns + g * kGroup;
                std::int32_t n[kGroup];
                for (std::size_t i = 0; i < kGroup; ++i) {
                    n[i] = in.low ? 128 * in.high[place + i] + in.low[place + i] : in.high[place + i];
                }
                std::int32_t dots[kRows] = {};
                for (std::size_t i = 0; i < 8; ++i) {
                    const std::uint8_t *v = p + 64 * (four ? i % 4 : i);
                    const int shift = four && i >= 4 ? 4 : 0, mask = four ? 15 : 255;
                    for (std::size_t r = 0; r < kRows; ++r) {
                        for (std::size_t c = 0; c < 4; ++c) {
                            dots[r] += ((v[4 * r + c] >> shift) & mask) * n[4 * i + c];
                        }
                    }
                }
                const float scale = in.scale[t * groups + g], sum = in.sum[t * groups + g];
                const std::int32_t offset = four ? 0 : 128 * in.whole[t * groups + g];
                for (std::size_t r = 0; r < kRows; ++r) {
                    sums[t][r] += half_to_float(scales[r]) * scale * static_cast<float>(dots[r] - offset);
                    if (four) sums[t][r] += half_to_float(minima[r]) * sum;
                }
            }
        }
        const std::size_t count = std::min(kRows, w.rows - b * kRows);
        for (std::size_t t = 0; t < in.tokens; ++t) {
            for (std::size_t r = 0; r < count; ++r) {
                out[t * stride + b * kRows + r] = sums[t][r] + (w.bias ? w.bias[b * kRows + r] : 0.0f);
            }
        }
    }
}

#ifdef ACTLAS_X86

// -- packed weights: VNNI -----------------------------------------------------------------------------

template <std::size_t tokens>
ACTLAS_VNNI inline void store_block(const Linear &w, const __m512 *sums, float *out, std::size_t stride,
                                    std::size_t block, std::size_t token) {
    const std::size_t count = std::min(kRows, w.rows - block * kRows);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
    const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + block * kRows) : _mm512_setzero_ps();
    for (std::size_t t = 0; t < tokens; ++t) {
        _mm512_mask_storeu_ps(out + (token + t) * stride + block * kRows, mask, _mm512_add_ps(sums[t], bias));
    }
}

ACTLAS_VNNI inline __m512 halves(const std::uint8_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

ACTLAS_VNNI inline __m512i four_bytes(const std::int8_t *from) {
    std::int32_t word;
    std::memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
}

template <std::size_t tokens, bool two>
ACTLAS_VNNI void q4_vnni(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                         std::size_t end, std::size_t token) {
    const std::size_t groups = w.columns / kGroup;
    const auto *data = static_cast<const std::uint8_t *>(w.data);
    const __m512i low = _mm512_set1_epi8(15);
    for (std::size_t b = begin; b < end; ++b) {
        __m512 sums[tokens];
        for (std::size_t t = 0; t < tokens; ++t) sums[t] = _mm512_setzero_ps();
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint8_t *p = data + (b * groups + g) * kQ4Block;
            __m512i first[4], second[4];
            for (int i = 0; i < 4; ++i) {
                const __m512i v = _mm512_loadu_si512(p + 64 * i);
                first[i] = _mm512_and_si512(v, low);
                second[i] = _mm512_and_si512(_mm512_srli_epi16(v, 4), low);
            }
            const __m512 scale = halves(p + 256), minimum = halves(p + 288);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t place = (token + t) * w.columns + g * kGroup;
                __m512i dot = _mm512_setzero_si512(), more = _mm512_setzero_si512();
                for (int i = 0; i < 4; ++i) {
                    dot = _mm512_dpbusd_epi32(dot, first[i], four_bytes(in.high + place + 4 * i));
                    more = _mm512_dpbusd_epi32(more, second[i], four_bytes(in.high + place + 16 + 4 * i));
                }
                dot = _mm512_add_epi32(dot, more);
                if (two) {
                    dot = _mm512_slli_epi32(dot, 7);
                    more = _mm512_setzero_si512();
                    for (int i = 0; i < 4; ++i) {
                        dot = _mm512_dpbusd_epi32(dot, first[i], four_bytes(in.low + place + 4 * i));
                        more = _mm512_dpbusd_epi32(more, second[i], four_bytes(in.low + place + 16 + 4 * i));
                    }
                    dot = _mm512_add_epi32(dot, more);
                }
                const __m512 value = _mm512_cvtepi32_ps(dot);
                const std::size_t at = (token + t) * groups + g;
                sums[t] = _mm512_fmadd_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(in.scale[at])), sums[t]);
                sums[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(in.sum[at]), sums[t]);
            }
        }
        store_block<tokens>(w, sums, out, stride, b, token);
    }
}

template <std::size_t tokens, bool two>
ACTLAS_VNNI void q8_vnni(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                         std::size_t end, std::size_t token) {
    const std::size_t groups = w.columns / kGroup;
    const auto *data = static_cast<const std::uint8_t *>(w.data);
    for (std::size_t b = begin; b < end; ++b) {
        __m512 sums[tokens];
        for (std::size_t t = 0; t < tokens; ++t) sums[t] = _mm512_setzero_ps();
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint8_t *p = data + (b * groups + g) * kQ8Block;
            __m512i v[8];
            for (int i = 0; i < 8; ++i) v[i] = _mm512_loadu_si512(p + 64 * i);
            const __m512 scale = halves(p + 512);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t at = (token + t) * groups + g;
                const std::size_t place = (token + t) * w.columns + g * kGroup;
                __m512i dot = _mm512_setzero_si512(), more = _mm512_set1_epi32(-128 * in.whole[at]);
                if (two) {
                    for (int i = 0; i < 8; ++i) dot = _mm512_dpbusd_epi32(dot, v[i], four_bytes(in.high + place + 4 * i));
                    dot = _mm512_slli_epi32(dot, 7);
                    for (int i = 0; i < 8; ++i) more = _mm512_dpbusd_epi32(more, v[i], four_bytes(in.low + place + 4 * i));
                } else {
                    for (int i = 0; i < 8; i += 2) {
                        dot = _mm512_dpbusd_epi32(dot, v[i], four_bytes(in.high + place + 4 * i));
                        more = _mm512_dpbusd_epi32(more, v[i + 1], four_bytes(in.high + place + 4 * i + 4));
                    }
                }
                const __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(dot, more));
                sums[t] = _mm512_fmadd_ps(value, _mm512_mul_ps(scale, _mm512_set1_ps(in.scale[at])), sums[t]);
            }
        }
        store_block<tokens>(w, sums, out, stride, b, token);
    }
}

template <std::size_t tokens>
void packed_vnni(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                 std::size_t end, std::size_t token) {
    const bool four = w.format == Format::q4;
    if (four && in.low)
        q4_vnni<tokens, true>(w, in, out, stride, begin, end, token);
    else if (four)
        q4_vnni<tokens, false>(w, in, out, stride, begin, end, token);
    else if (in.low)
        q8_vnni<tokens, true>(w, in, out, stride, begin, end, token);
    else
        q8_vnni<tokens, false>(w, in, out, stride, begin, end, token);
}

#endif

template <std::size_t lanes> ACTLAS_INLINE void quantise_rows(const Inputs &in) {
    const std::size_t groups = in.columns / kGroup;
    for (std::size_t t = 0; t < in.tokens; ++t) {
        for (std::size_t g = 0; g < groups; ++g) {
            const float *x = in.x + t * in.columns + g * kGroup;
            std::int8_t *high = in.high + t * in.columns + g * kGroup;
            std::int8_t *low = in.low ? in.low + t * in.columns + g * kGroup : nullptr;
            float largest = 0.0f;
            for (std::size_t i = 0; i < kGroup; ++i) largest = std::max(largest, std::fabs(x[i]));
            const float most = low ? 16256.0f : 127.0f;
            const float scale = largest / most, inverse = largest > 0.0f ? most / largest : 0.0f;
            std::int32_t total = 0, n[kGroup];
            for (std::size_t i = 0; i < kGroup; ++i) {
                // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
                n[i] = static_cast<std::int32_t>(x[i] * inverse + 12582912.0f - 12582912.0f);
                total += n[i];
            }
            if (low) {
                for (std::size_t i = 0; i < kGroup; ++i) {
                    const std::int32_t top = (n[i] + 64) >> 7;
                    high[i] = static_cast<std::int8_t>(top);
                    low[i] = static_cast<std::int8_t>(n[i] - 128 * top);
                }
            } else {
                for (std::size_t i = 0; i < kGroup; ++i) high[i] = static_cast<std::int8_t>(n[i]);
            }
            in.scale[t * groups + g] = scale;
            in.sum[t * groups + g] = scale * static_cast<float>(total);
            in.whole[t * groups + g] = total;
        }
    }
}
ACTLAS_FOR_LEVELS(quantise_rows, (const Inputs &in), (in))

}  // namespace

bool has_vnni() {
#ifdef ACTLAS_X86
    static const bool found = best_level() == Level::avx512 && __builtin_cpu_supports("avx512vnni");
    return found;
#else
    return false;
#endif
}

void quantise(const Inputs &inputs, Level level) { quantise_rows_for(level)(inputs); }

void apply_linear(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end, Level level) {
    if (begin >= end) return;
    if (w.format == Format::f32) {
        float_linear_for(level)(w, in, out, stride, begin, end);
        return;
    }
#ifdef ACTLAS_X86
    if (level == Level::avx512 && has_vnni()) {
        if (in.tokens == 1) {
            packed_vnni<1>(w, in, out, stride, begin, end, 0);
            return;
        }
        for (std::size_t b = begin; b < end; ++b) {
            std::size_t t = 0;
            for (; t + 4 <= in.tokens; t += 4) packed_vnni<4>(w, in, out, stride, b, b + 1, t);
            for (; t + 2 <= in.tokens; t += 2) packed_vnni<2>(w, in, out, stride, b, b + 1, t);
            for (; t < in.tokens; ++t) packed_vnni<1>(w, in, out, stride, b, b + 1, t);
        }
        return;
    }
#endif
    packed_plain(w, in, out, stride, begin, end);
}

}  // namespace actlas
