#include "packed.hpp"

#include <cmath>
#include <stdexcept>

#include "half.hpp"
#include "vnni.hpp"

namespace actlas {
namespace {

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
            const __m512 scale = sixteen_halves(p + 256), minimum = sixteen_halves(p + 288);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t place = (token + t) * w.columns + g * kGroup;
                __m512i dot = _mm512_setzero_si512(), more = _mm512_setzero_si512();
                for (int i = 0; i < 4; ++i) {
                    add_dots(dot, first[i], four_bytes(in.high + place + 4 * i));
                    add_dots(more, second[i], four_bytes(in.high + place + 16 + 4 * i));
                }
                dot = _mm512_add_epi32(dot, more);
                if (two) {
                    dot = _mm512_slli_epi32(dot, 7);
                    more = _mm512_setzero_si512();
                    for (int i = 0; i < 4; ++i) {
                        add_dots(dot, first[i], four_bytes(in.low + place + 4 * i));
                        add_dots(more, second[i], four_bytes(in.low + place + 16 + 4 * i));
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
            const __m512 scale = sixteen_halves(p + 512);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t at = (token + t) * groups + g;
                const std::size_t place = (token + t) * w.columns + g * kGroup;
                __m512i dot = _mm512_setzero_si512(), more = _mm512_set1_epi32(-128 * in.whole[at]);
                if (two) {
                    for (int i = 0; i < 8; ++i) add_dots(dot, v[i], four_bytes(in.high + place + 4 * i));
                    dot = _mm512_slli_epi32(dot, 7);
                    for (int i = 0; i < 8; ++i) add_dots(more, v[i], four_bytes(in.low + place + 4 * i));
                } else {
                    for (int i = 0; i < 8; i += 2) {
                        add_dots(dot, v[i], four_bytes(in.high + place + 4 * i));
                        add_dots(more, v[i + 1], four_bytes(in.high + place + 4 * i + 4));
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
    using Floats = typename Vec<lanes>::Floats;
    using Ints = typename Vec<lanes>::Ints;
    constexpr std::size_t parts = kGroup / lanes;
    const std::size_t runs = in.columns / kGroup;
    for (std::size_t t = 0; t < in.tokens; ++t) {
        for (std::size_t g = 0; g < runs; ++g) {
            const std::size_t place = t * in.columns + g * kGroup, at = t * runs + g;
            Floats x[parts], most = {}, odd = {};
            for (std::size_t i = 0; i < parts; ++i) {
                load(x[i], in.x + place + i * lanes);
                const Floats size = x[i] < 0.0f ? -x[i] : x[i];
                most = size > most ? size : most;
                odd += x[i] * 0.0f;  // NaN where x is NaN or infinite
            }
            float largest = 0.0f, wrong = 0.0f;
            for (std::size_t l = 0; l < lanes; ++l) {
                largest = std::max(largest, most[l]);
                wrong += odd[l];
            }
            if (wrong != 0.0f) {  // nothing can be rounded; the products become NaN
                std::memset(in.high + place, 0, kGroup);
                if (in.low) std::memset(in.low + place, 0, kGroup);
                in.scale[at] = in.sum[at] = NAN;
                in.whole[at] = 0;
                continue;
            }
            const float top = in.low ? 16256.0f : 127.0f;
            const float scale = largest / top, inverse = largest > 0.0f ? top / largest : 0.0f;
            Ints total = {};
            for (std::size_t i = 0; i < parts; ++i) {
                // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even.
                const Ints n = __builtin_convertvector(x[i] * inverse + 12582912.0f - 12582912.0f, Ints);
                total += n;
                if (in.low) {
                    const Ints high = (n + 64) >> 7;
                    store_bytes<lanes>(in.high + place + i * lanes, high);
                    store_bytes<lanes>(in.low + place + i * lanes, n - 128 * high);
                } else {
                    store_bytes<lanes>(in.high + place + i * lanes, n);
                }
            }
            std::int32_t whole = 0;
            for (std::size_t l = 0; l < lanes; ++l) whole += total[l];
            in.scale[at] = scale;
            in.sum[at] = scale * static_cast<float>(whole);
            in.whole[at] = whole;
        }
    }
}
ACTLAS_FOR_LEVELS(quantise_rows, (const Inputs &in), (in))

}  // namespace

Linear linear_of(const std::string &format, const void *data, std::size_t bytes, std::size_t rows,
                 std::size_t columns, std::size_t group, const std::string &offset) {
    const auto require = [](bool fits, const char *what) {
        if (!fits) throw std::invalid_argument(what);
    };
    const char *const formats[] = {"f32", "q8", "q4", "q3", "q2", "f4", "bf16", "e4m3", "e5m2"};
    const char *const offsets[] = {"none", "minimum", "integer"};
    Linear w;
    for (int i = 0; i < 9; ++i) {
        if (format == formats[i]) w.format = static_cast<Format>(i + 1);
    }
    for (int i = 0; i < 3; ++i) {
        if (offset == offsets[i]) w.given = static_cast<Offset>(i + 1);
    }
    require(w.format != Format::none, "format must be f32, bf16, q8, q4, q3, q2, f4, e4m3 or e5m2");
    require(w.given != Offset::natural, "offset must be none, minimum or integer");
    w.data = data;
    w.rows = rows;
    w.columns = columns;
    w.group = w.bits() > 8 ? columns : group;
    require(rows > 0 && columns > 0, "a linear layer has rows and columns");
    require(w.floats() || group == 32 || group == 64 || group == 128, "group must be 32, 64 or 128");
    require(w.group > 0 && columns % w.group == 0, "columns come in whole groups");
    require(w.format != Format::f4 || w.given == Offset::none, "f4 has no offset");
    require(bytes == w.bytes(), "the data has not the size of its format");
    return w;
}

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
    if (w.floats()) {
        apply_narrow_floats(w, in, out, stride, begin, end, level);
        return;
    }
#ifdef ACTLAS_X86
    const bool eight = w.format == Format::q8 && w.offset() == Offset::none;
    const bool four = w.format == Format::q4 && w.offset() == Offset::minimum;
    if (level == Level::avx512 && has_vnni() && w.group == kGroup && (eight || four)) {
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
    apply_groups(w, in, out, stride, begin, end, level);
}

}  // namespace actlas
