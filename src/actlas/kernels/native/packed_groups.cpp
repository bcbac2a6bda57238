// Rows of packed integers of 8, 4, 3 or 2 bits and of 4-bit floats, for every group and offset.
#include "half.hpp"
#include "packed.hpp"
#include "vnni.hpp"

namespace actlas {
namespace {

// Twice the values of the 16 codes of f4.
constexpr std::int32_t kFloat4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// What is taken from a code before it is multiplied.
std::int32_t middle(const Linear &w) {
    if (w.format == Format::f4) return 12;  // its table is kept from 0 to 24
    return w.offset() == Offset::none ? 1 << (w.bits() - 1) : 0;
}

// -- with vector types --------------------------------------------------------------------------------

// The sums of a run of 32 inputs for 16 rows: codes as they are, times the integers of one token.
template <std::size_t lanes>
ACTLAS_INLINE void run_dots(const Linear &w, const std::uint8_t *p, const std::int32_t *n, std::int32_t *dots) {
    using Ints = typename Vec<lanes>::Ints;
    using Bits = typename Vec<lanes>::Bits;
    const std::size_t bits = w.bits();
    const std::size_t vectors = bits == 8 ? 8 : bits == 4 ? 4 : 2;  // of 64 bytes; q3 has one more
    const auto mask = static_cast<std::uint32_t>(bits == 8 ? 255 : bits == 4 ? 15 : 3);
    const std::size_t step = 8 / vectors;  // vectors of inputs in one
    for (std::size_t r = 0; r < kRows; r += lanes) {
        Ints sum = {};
        for (std::size_t i = 0; i < 8; ++i) {
            // q4: i and i + 4 share a vector; q2 and q3: four neighbours do.
            const std::size_t at = bits == 4 ? i % 4 : i / step;
            const auto shift = static_cast<std::uint32_t>(bits == 8 ? 0 : bits == 4 ? 4 * (i / 4) : 2 * (i % 4));
            Bits word, third = {};
            load(word, p + 64 * at + 4 * r);
            if (bits == 3) load(third, p + 128 + 4 * r);
            for (std::uint32_t c = 0; c < 4; ++c) {
                Bits code = (word >> (8 * c + shift)) & mask;
                if (bits == 3) code |= ((third >> (8 * c + static_cast<std::uint32_t>(i))) & 1u) << 2;
                if (w.format == Format::f4) {
                    for (std::size_t l = 0; l < lanes; ++l) {
                        code[l] = static_cast<std::uint32_t>(kFloat4[code[l]] + 12);
                    }
                }
                Ints signed_code;
                std::memcpy(&signed_code, &code, sizeof code);
                sum += signed_code * n[4 * i + c];
            }
        }
        store(dots + r, sum);
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void plain_groups(const Linear &w, const Inputs &in, float *out, std::size_t stride,
                                std::size_t begin, std::size_t end) {
    const std::size_t groups = w.columns / w.group, runs = w.columns / kGroup, each = w.group / kGroup;
    const std::size_t size = w.group_bytes(), codes = 64 * w.bits();
    const auto *data = static_cast<const std::uint8_t *>(w.data);
    const std::int32_t taken = middle(w);
    for (std::size_t b = begin; b < end; ++b) {
        float sums[kMostTokens][kRows] = {};
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint8_t *p = data + (b * groups + g) * size;
            std::uint16_t halves[2 * kRows] = {};
            std::memcpy(halves, p + each * codes, w.offset() == Offset::none ? 32 : 64);
            for (std::size_t t = 0; t < in.tokens; ++t) {
                float part[kRows] = {}, sum = 0.0f;
                for (std::size_t k = 0; k < each; ++k) {
                    const std::size_t at = t * runs + g * each + k, place = t * w.columns + (g * each + k) * kGroup;
                    std::int32_t n[kGroup], dots[kRows];
                    for (std::size_t i = 0; i < kGroup; ++i) {
                        n[i] = in.low ? 128 * in.high[place + i] + in.low[place + i] : in.high[place + i];
                    }
                    run_dots<lanes>(w, p + k * codes, n, dots);
                    const std::int32_t less = taken * in.whole[at];
                    for (std::size_t r = 0; r < kRows; ++r) {
                        part[r] += in.scale[at] * static_cast<float>(dots[r] - less);
                    }
                    sum += in.sum[at];
                }
                for (std::size_t r = 0; r < kRows; ++r) {
                    const float scale = half_to_float(halves[r]), offset = half_to_float(halves[kRows + r]);
                    sums[t][r] += scale * part[r];
                    if (w.offset() == Offset::minimum) sums[t][r] += offset * sum;
                    if (w.offset() == Offset::integer) sums[t][r] -= scale * offset * sum;
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
ACTLAS_FOR_LEVELS(plain_groups,
                  (const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                   std::size_t end),
                  (w, in, out, stride, begin, end))

#ifdef ACTLAS_X86

// -- VNNI ---------------------------------------------------------------------------------------------

// The eight vectors of a run, a code in each byte.
template <Format format> ACTLAS_VNNI inline void unpack(const std::uint8_t *p, __m512i *v) {
    if (format == Format::q8) {
        for (int i = 0; i < 8; ++i) v[i] = _mm512_loadu_si512(p + 64 * i);
    } else if (format == Format::q4 || format == Format::f4) {
        const __m512i mask = _mm512_set1_epi8(15);
        const __m512i table =
            _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        for (int i = 0; i < 4; ++i) {
            const __m512i bytes = _mm512_loadu_si512(p + 64 * i);
            v[i] = _mm512_and_si512(bytes, mask);
            v[i + 4] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
        }
        if (format == Format::f4) {
            for (int i = 0; i < 8; ++i) v[i] = _mm512_shuffle_epi8(table, v[i]);
        }
    } else {
        const __m512i mask = _mm512_set1_epi8(3);
        for (int j = 0; j < 2; ++j) {
            const __m512i bytes = _mm512_loadu_si512(p + 64 * j);
            v[4 * j] = _mm512_and_si512(bytes, mask);
            v[4 * j + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask);
            v[4 * j + 2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
            v[4 * j + 3] = _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask);
        }
        if (format == Format::q3) {
            const __m512i bytes = _mm512_loadu_si512(p + 128), four = _mm512_set1_epi8(4);
            const __m512i moved[8] = {_mm512_slli_epi16(bytes, 2), _mm512_slli_epi16(bytes, 1), bytes,
                                      _mm512_srli_epi16(bytes, 1), _mm512_srli_epi16(bytes, 2),
                                      _mm512_srli_epi16(bytes, 3), _mm512_srli_epi16(bytes, 4),
                                      _mm512_srli_epi16(bytes, 5)};
            for (int i = 0; i < 8; ++i) v[i] = _mm512_or_si512(v[i], _mm512_and_si512(moved[i], four));
        }
    }
}

template <Format format, std::size_t tokens, bool two>
ACTLAS_VNNI void groups_vnni(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                             std::size_t end, std::size_t token) {
    const std::size_t groups = w.columns / w.group, runs = w.columns / kGroup, each = w.group / kGroup;
    const std::size_t size = w.group_bytes(), codes = 64 * w.bits();
    const auto *data = static_cast<const std::uint8_t *>(w.data);
    const std::int32_t taken = middle(w);
    const Offset offset = w.offset();
    for (std::size_t b = begin; b < end; ++b) {
        __m512 sums[tokens];
        for (std::size_t t = 0; t < tokens; ++t) sums[t] = _mm512_setzero_ps();
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint8_t *p = data + (b * groups + g) * size;
            __m512 part[tokens];
            float sum[tokens] = {};
            for (std::size_t t = 0; t < tokens; ++t) part[t] = _mm512_setzero_ps();
            for (std::size_t k = 0; k < each; ++k) {
                __m512i v[8];
                unpack<format>(p + k * codes, v);
                for (std::size_t t = 0; t < tokens; ++t) {
                    const std::size_t at = (token + t) * runs + g * each + k;
                    const std::size_t place = (token + t) * w.columns + (g * each + k) * kGroup;
                    __m512i dot = _mm512_setzero_si512(), more = _mm512_set1_epi32(-taken * in.whole[at]);
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
                    part[t] = _mm512_fmadd_ps(value, _mm512_set1_ps(in.scale[at]), part[t]);
                    sum[t] += in.sum[at];
                }
            }
            const __m512 scale = sixteen_halves(p + each * codes);
            __m512 minimum = _mm512_setzero_ps();
            if (offset != Offset::none) minimum = sixteen_halves(p + each * codes + 32);
            if (offset == Offset::integer) minimum = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, minimum));
            for (std::size_t t = 0; t < tokens; ++t) {
                sums[t] = _mm512_fmadd_ps(part[t], scale, sums[t]);
                if (offset != Offset::none) sums[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sum[t]), sums[t]);
            }
        }
        const std::size_t count = std::min(kRows, w.rows - b * kRows);
        const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
        const __m512 bias = w.bias ? _mm512_maskz_loadu_ps(mask, w.bias + b * kRows) : _mm512_setzero_ps();
        for (std::size_t t = 0; t < tokens; ++t) {
            _mm512_mask_storeu_ps(out + (token + t) * stride + b * kRows, mask, _mm512_add_ps(sums[t], bias));
        }
    }
}

template <Format format, bool two>
void all_tokens(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                std::size_t end) {
    if (in.tokens == 1) {
        groups_vnni<format, 1, two>(w, in, out, stride, begin, end, 0);
        return;
    }
    for (std::size_t b = begin; b < end; ++b) {
        std::size_t t = 0;
        for (; t + 4 <= in.tokens; t += 4) groups_vnni<format, 4, two>(w, in, out, stride, b, b + 1, t);
        for (; t < in.tokens; ++t) groups_vnni<format, 1, two>(w, in, out, stride, b, b + 1, t);
    }
}

template <bool two>
void any_format(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                std::size_t end) {
    switch (w.format) {
        case Format::q8: return all_tokens<Format::q8, two>(w, in, out, stride, begin, end);
        case Format::q4: return all_tokens<Format::q4, two>(w, in, out, stride, begin, end);
        case Format::q3: return all_tokens<Format::q3, two>(w, in, out, stride, begin, end);
        case Format::q2: return all_tokens<Format::q2, two>(w, in, out, stride, begin, end);
        default: return all_tokens<Format::f4, two>(w, in, out, stride, begin, end);
    }
}

#endif

}  // namespace

void apply_groups(const Linear &w, const Inputs &in, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end, Level level) {
#ifdef ACTLAS_X86
    if (level == Level::avx512 && has_vnni()) {
        if (in.low)
            any_format<true>(w, in, out, stride, begin, end);
        else
            any_format<false>(w, in, out, stride, begin, end);
        return;
    }
#endif
    plain_groups_for(level)(w, in, out, stride, begin, end);
}

}  // namespace actlas
