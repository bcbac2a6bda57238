// Rows of bfloat16 and of 8-bit floats.
#include "half.hpp"
#include "packed.hpp"

#ifdef ACTLAS_X86
#include <immintrin.h>
#endif

namespace actlas {
namespace {

struct Brain {
    using Code = std::uint16_t;
    template <std::size_t lanes> ACTLAS_INLINE static void read(typename Vec<lanes>::Floats &v, const Code *from) {
        widen_bfloat16<lanes>(v, from);
    }
};
template <int exponent> struct Eight {
    using Code = std::uint8_t;
    template <std::size_t lanes> ACTLAS_INLINE static void read(typename Vec<lanes>::Floats &v, const Code *from) {
        widen_float8<lanes, exponent>(v, from);
    }
};

// Four rows of one token, or two rows of four tokens.
template <std::size_t lanes, class Kind, std::size_t tokens>
ACTLAS_INLINE void some_rows(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                             std::size_t end, std::size_t token) {
    using Floats = typename Vec<lanes>::Floats;
    using Code = typename Kind::Code;
    constexpr bool scaled = sizeof(Code) == 1;
    constexpr std::size_t at_once = tokens == 1 ? 4 : 2;
    const auto *codes = static_cast<const Code *>(w.data);
    const std::size_t d = w.columns, last = std::min(end * kRows, w.rows);
    const std::size_t group = scaled ? w.group : d, groups = d / group;
    const float *scales = reinterpret_cast<const float *>(static_cast<const std::uint8_t *>(w.data) + w.rows * d);
    for (std::size_t r = begin * kRows; r < last; r += at_once) {
        const std::size_t count = std::min(at_once, last - r);
        float totals[at_once][tokens] = {};
        for (std::size_t g = 0; g < groups; ++g) {
            Floats sums[at_once][tokens] = {};
            float rest[at_once][tokens] = {};
            const Code *rows[at_once];
            for (std::size_t i = 0; i < at_once; ++i) rows[i] = codes + (r + std::min(i, count - 1)) * d + g * group;
            const float *x = in.x + token * d + g * group;
            std::size_t c = 0;
            for (; c + lanes <= group; c += lanes) {
                Floats inputs[tokens], v;
                for (std::size_t t = 0; t < tokens; ++t) load(inputs[t], x + t * d + c);
                for (std::size_t i = 0; i < at_once; ++i) {
                    Kind::template read<lanes>(v, rows[i] + c);
                    for (std::size_t t = 0; t < tokens; ++t) sums[i][t] += v * inputs[t];
                }
            }
            if (c < group) {  // the last few, with zeros behind
                Code tail[lanes];
                Floats v;
                for (std::size_t i = 0; i < count; ++i) {
                    std::memset(tail, 0, sizeof tail);
                    std::memcpy(tail, rows[i] + c, (group - c) * sizeof(Code));
                    Kind::template read<lanes>(v, tail);
                    for (std::size_t t = 0; t < tokens; ++t) {
                        for (std::size_t k = c; k < group; ++k) rest[i][t] += v[k - c] * x[t * d + k];
                    }
                }
            }
            for (std::size_t i = 0; i < count; ++i) {
                const float scale = scaled ? scales[(r + i) * groups + g] : 1.0f;
                for (std::size_t t = 0; t < tokens; ++t) {
                    float total = rest[i][t];
                    for (std::size_t l = 0; l < lanes; ++l) total += sums[i][t][l];
                    totals[i][t] += scale * total;
                }
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t t = 0; t < tokens; ++t) {
                out[(token + t) * stride + r + i] = totals[i][t] + (w.bias ? w.bias[r + i] : 0.0f);
            }
        }
    }
}

#ifdef ACTLAS_X86
#define ACTLAS_HALVES __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,f16c")))

// Sixteen 8-bit floats by way of float16, whose exponent is wide enough: e5m2 is its upper byte, and e4m3 moved by
// seven bits is 2^-8 of its value, subnormal numbers too.
template <int exponent> ACTLAS_HALVES inline __m512 sixteen_floats(const std::uint8_t *from, __mmask16 mask) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, from);
    if (exponent == 5) return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8));
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16(static_cast<short>(0xbfff))));
}

template <int exponent, std::size_t tokens>
ACTLAS_HALVES void eight_rows(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                              std::size_t end, std::size_t token) {
    constexpr std::size_t at_once = tokens == 1 ? 4 : 2;
    const auto *codes = static_cast<const std::uint8_t *>(w.data);
    const std::size_t d = w.columns, groups = d / w.group, last = std::min(end * kRows, w.rows);
    const float *scales = reinterpret_cast<const float *>(codes + w.rows * d);
    for (std::size_t r = begin * kRows; r < last; r += at_once) {
        const std::size_t count = std::min(at_once, last - r);
        __m512 totals[at_once][tokens];
        for (auto &row : totals) {
            for (auto &total : row) total = _mm512_setzero_ps();
        }
        for (std::size_t g = 0; g < groups; ++g) {
            const std::size_t first = g * w.group;
            __m512 sums[at_once][tokens];
            for (auto &row : sums) {
                for (auto &sum : row) sum = _mm512_setzero_ps();
            }
            for (std::size_t c = 0; c < w.group; c += 16) {
                const std::size_t left = w.group - c;
                const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1u);
                __m512 x[tokens];
                for (std::size_t t = 0; t < tokens; ++t) {
                    x[t] = _mm512_maskz_loadu_ps(mask, in.x + (token + t) * d + first + c);
                }
                for (std::size_t i = 0; i < at_once; ++i) {
                    const std::uint8_t *row = codes + (r + std::min(i, count - 1)) * d + first + c;
                    const __m512 v = sixteen_floats<exponent>(row, mask);
                    for (std::size_t t = 0; t < tokens; ++t) sums[i][t] = _mm512_fmadd_ps(v, x[t], sums[i][t]);
                }
            }
            for (std::size_t i = 0; i < count; ++i) {
                const __m512 scale = _mm512_set1_ps(scales[(r + i) * groups + g] * (exponent == 4 ? 256.0f : 1.0f));
                for (std::size_t t = 0; t < tokens; ++t) totals[i][t] = _mm512_fmadd_ps(sums[i][t], scale, totals[i][t]);
            }
        }
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t t = 0; t < tokens; ++t) {
                out[(token + t) * stride + r + i] =
                    _mm512_reduce_add_ps(totals[i][t]) + (w.bias ? w.bias[r + i] : 0.0f);
            }
        }
    }
}

template <int exponent>
void eight_tokens(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end) {
    if (in.tokens == 1) return eight_rows<exponent, 1>(w, in, out, stride, begin, end, 0);
    for (std::size_t b = begin; b < end; ++b) {
        std::size_t t = 0;
        for (; t + 4 <= in.tokens; t += 4) eight_rows<exponent, 4>(w, in, out, stride, b, b + 1, t);
        for (; t < in.tokens; ++t) eight_rows<exponent, 1>(w, in, out, stride, b, b + 1, t);
    }
}
#endif

template <std::size_t lanes, class Kind>
ACTLAS_INLINE void all_tokens(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                              std::size_t end) {
    if (in.tokens == 1) {
        some_rows<lanes, Kind, 1>(w, in, out, stride, begin, end, 0);
        return;
    }
    for (std::size_t b = begin; b < end; ++b) {
        std::size_t t = 0;
        for (; t + 4 <= in.tokens; t += 4) some_rows<lanes, Kind, 4>(w, in, out, stride, b, b + 1, t);
        for (; t < in.tokens; ++t) some_rows<lanes, Kind, 1>(w, in, out, stride, b, b + 1, t);
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void narrow_rows(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                               std::size_t end) {
    if (w.format == Format::bf16)
        all_tokens<lanes, Brain>(w, in, out, stride, begin, end);
    else if (w.format == Format::e4m3)
        all_tokens<lanes, Eight<4>>(w, in, out, stride, begin, end);
    else
        all_tokens<lanes, Eight<5>>(w, in, out, stride, begin, end);
}
ACTLAS_FOR_LEVELS(narrow_rows,
                  (const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                   std::size_t end),
                  (w, in, out, stride, begin, end))

}  // namespace

void apply_narrow_floats(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                         std::size_t end, Level level) {
#ifdef ACTLAS_X86
    if (level == Level::avx512 && best_level() == Level::avx512 && w.bits() == 8) {
        if (w.format == Format::e4m3) return eight_tokens<4>(w, in, out, stride, begin, end);
        return eight_tokens<5>(w, in, out, stride, begin, end);
    }
#endif
    narrow_rows_for(level)(w, in, out, stride, begin, end);
}

}  // namespace actlas
