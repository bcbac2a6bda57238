#include "gated.hpp"

#include "half.hpp"
#include "vnni.hpp"

namespace actlas {
namespace {

std::uint16_t half_at(const std::uint8_t *p) {
    std::uint16_t value;
    std::memcpy(&value, p, 2);
    return value;
}

template <std::size_t lanes> ACTLAS_INLINE float float_dot(const Gathered &w, std::size_t row, const float *x) {
    using Floats = typename Vec<lanes>::Floats;
    const std::size_t d = w.columns;
    const std::uint8_t *data = w.data + row * w.row_bytes();
    Floats sums[4] = {}, v, in;
    std::size_t c = 0;
    for (; c + lanes <= d; c += lanes) {
        load(in, x + c);
        if (w.format == RowFormat::f32)
            load(v, reinterpret_cast<const float *>(data) + c);
        else
            widen_bfloat16<lanes>(v, reinterpret_cast<const std::uint16_t *>(data) + c);
        sums[c / lanes % 4] += v * in;
    }
    sums[0] += (sums[1] + sums[2]) + sums[3];
    float total = 0.0f;
    for (std::size_t l = 0; l < lanes; ++l) total += sums[0][l];
    for (; c < d; ++c) {
        float one;
        if (w.format == RowFormat::f32) {
            std::memcpy(&one, data + 4 * c, 4);
        } else {
            const std::uint32_t bits = static_cast<std::uint32_t>(half_at(data + 2 * c)) << 16;
            std::memcpy(&one, &bits, 4);
        }
        total += one * x[c];
    }
    return total;
}

// Integers of a row with those of the token; a plain loop.
ACTLAS_INLINE float packed_dot(const Gathered &w, std::size_t row, const Inputs &in) {
    const bool four = w.format == RowFormat::r4;
    const std::uint8_t *p = w.data + row * w.row_bytes();
    float total = 0.0f;
    for (std::size_t g = 0; g < w.columns / kGroup; ++g, p += four ? 20 : 34) {
        std::int32_t dot = four ? 0 : -128 * in.whole[g];
        for (std::size_t i = 0; i < kGroup; ++i) {
            const std::size_t at = g * kGroup + i;
            const std::int32_t n = in.low ? 128 * in.high[at] + in.low[at] : in.high[at];
            dot += n * (four ? (p[i % 16] >> (i / 16 * 4)) & 15 : p[i]);
        }
        total += half_to_float(half_at(p + (four ? 16 : 32))) * in.scale[g] * static_cast<float>(dot);
        if (four) total += half_to_float(half_at(p + 18)) * in.sum[g];
    }
    return total;
}

template <std::size_t lanes>
ACTLAS_INLINE void plain_gather(const Gathered &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                                const float *factor, float *out) {
    for (std::size_t i = 0; i < count; ++i) {
        const auto j = static_cast<std::size_t>(active[i]);
        out[j] = factor[j] * (w.packed() ? packed_dot(w, j, in) : float_dot<lanes>(w, j, in.x));
    }
}
ACTLAS_FOR_LEVELS(plain_gather,
                  (const Gathered &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                   const float *factor, float *out),
                  (w, in, active, count, factor, out))

#ifdef ACTLAS_X86

ACTLAS_VNNI inline void add_dots(__m256i &sums, __m256i a, __m256i b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

ACTLAS_VNNI inline __m256i integers(const std::int8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}

template <bool four, bool two>
ACTLAS_VNNI void vnni_gather(const Gathered &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                             const float *factor, float *out) {
    const std::size_t groups = w.columns / kGroup, bytes = w.row_bytes();
    const __m256i mask = _mm256_set1_epi8(15);
    for (std::size_t i = 0; i < count; ++i) {
        const auto j = static_cast<std::size_t>(active[i]);
        if (i + 2 < count) {  // rows further on are fetched meanwhile
            const std::uint8_t *later = w.data + static_cast<std::size_t>(active[i + 2]) * bytes;
            for (std::size_t at = 0; at < bytes; at += 64) __builtin_prefetch(later + at, 0, 2);
        }
        const std::uint8_t *p = w.data + j * bytes;
        __m256 sums = _mm256_setzero_ps();
        float minima = 0.0f;
        for (std::size_t g = 0; g < groups; ++g, p += four ? 20 : 34) {
            __m256i q;
            if (four) {
                const __m128i nibbles = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
                q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(nibbles, 4), nibbles), mask);
            } else {
                q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
            }
            __m256i dot = _mm256_setzero_si256();
            add_dots(dot, q, integers(in.high + g * kGroup));
            if (two) {
                dot = _mm256_slli_epi32(dot, 7);
                add_dots(dot, q, integers(in.low + g * kGroup));
            }
            const float scale = _cvtsh_ss(half_at(p + (four ? 16 : 32))) * in.scale[g];
            sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale), sums);
            if (four)
                minima += _cvtsh_ss(half_at(p + 18)) * in.sum[g];
            else
                minima -= scale * 128.0f * static_cast<float>(in.whole[g]);
        }
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        half = _mm_add_ss(half, _mm_shuffle_ps(half, half, 1));
        out[j] = factor[j] * (_mm_cvtss_f32(half) + minima);
    }
}

#endif

}  // namespace

void gather_rows(const Gathered &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                 const float *factor, float *out, Level level) {
#ifdef ACTLAS_X86
    if (w.packed() && level == Level::avx512 && has_vnni()) {
        const bool four = w.format == RowFormat::r4, two = in.low != nullptr;
        const auto run = four ? (two ? vnni_gather<true, true> : vnni_gather<true, false>)
                              : (two ? vnni_gather<false, true> : vnni_gather<false, false>);
        run(w, in, active, count, factor, out);
        return;
    }
#endif
    plain_gather_for(level)(w, in, active, count, factor, out);
}

}  // namespace actlas
