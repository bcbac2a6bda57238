#include "columns.hpp"

#ifdef ACTLAS_X86
#include <immintrin.h>
#define ACTLAS_VNNI __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx512vnni,avx2,fma,f16c")))
#endif

namespace actlas {
namespace {

ACTLAS_INLINE void fetch(const std::uint8_t *p, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// -- float columns ------------------------------------------------------------------------------------

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const std::uint16_t *from) {
    typename Vec<lanes>::Halves half;
    load(half, from);
    const typename Vec<lanes>::Bits bits = __builtin_convertvector(half, typename Vec<lanes>::Bits) << 16;
    std::memcpy(&v, &bits, sizeof v);
}

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const float *from) {
    load(v, from);
}

ACTLAS_INLINE float one(const float *from) { return *from; }
ACTLAS_INLINE float one(const std::uint16_t *from) {
    const std::uint32_t bits = static_cast<std::uint32_t>(*from) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
}

template <std::size_t lanes, class T>
ACTLAS_INLINE void float_columns(const Columns &w, const float *x, const std::int32_t *active, std::size_t count,
                                 float *y) {
    using Floats = typename Vec<lanes>::Floats;
    constexpr std::size_t at_once = 8;
    const T *data = reinterpret_cast<const T *>(w.data);
    const std::size_t rows = w.rows;
    for (std::size_t a = 0; a < count; a += at_once) {
        const std::size_t n = std::min(at_once, count - a);
        const T *column[at_once];
        float factor[at_once];
        for (std::size_t i = 0; i < at_once; ++i) {  // missing ones repeat the last with a factor of 0
            const std::size_t j = static_cast<std::size_t>(active[a + std::min(i, n - 1)]);
            column[i] = data + j * rows;
            factor[i] = i < n ? x[j] : 0.0f;
        }
        std::size_t r = 0;
        for (; r + lanes <= rows; r += lanes) {
            Floats sum, v;
            load(sum, y + r);
            for (std::size_t i = 0; i < at_once; ++i) {
                widen<lanes>(v, column[i] + r);
                sum += v * factor[i];
            }
            store(y + r, sum);
        }
        for (; r < rows; ++r) {
            for (std::size_t i = 0; i < n; ++i) y[r] += one(column[i] + r) * factor[i];
        }
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void either_columns(const Columns &w, const float *x, const std::int32_t *active, std::size_t count,
                                  float *y) {
    if (w.format == ColumnFormat::f32)
        float_columns<lanes, float>(w, x, active, count, y);
    else
        float_columns<lanes, std::uint16_t>(w, x, active, count, y);
}
ACTLAS_FOR_LEVELS(either_columns,
                  (const Columns &w, const float *x, const std::int32_t *active, std::size_t count, float *y),
                  (w, x, active, count, y))

// -- packed columns: a plain loop ---------------------------------------------------------------------

float plain_half(std::uint16_t h) {
    const std::uint32_t exponent = (h >> 10) & 31u, fraction = h & 1023u;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    } else {
        const std::uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (fraction << 13);
        std::memcpy(&value, &bits, 4);
    }
    return h & 0x8000u ? -value : value;
}

void plain_group(const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count, std::size_t g,
                 float *y) {
    const bool four = w.format == ColumnFormat::q4;
    const std::size_t padded = w.padded(), bytes = w.column_bytes(), groups = w.columns / kGroup;
    const auto *scales = reinterpret_cast<const std::uint16_t *>(w.data + w.columns * bytes);
    for (std::size_t r = 0; r < padded; ++r) {
        const std::size_t tile = r / 64 * 64, i = r % 64 / 16, lane = r % 16 / 4, e = r % 4;
        const std::size_t place = 16 * lane + 4 * i + e;  // of this row within 64
        const std::size_t at = four ? r / 128 * 64 + place : tile + place;
        const int shift = four && r % 128 >= 64 ? 4 : 0;
        std::int32_t dot = four ? 0 : -128 * in.whole[g];
        for (std::size_t a = 0; a < count; ++a) {
            const std::size_t j = static_cast<std::size_t>(active[a]);
            const std::int32_t n = in.low ? 128 * in.high[j] + in.low[j] : in.high[j];
            const std::int32_t q = w.data[j * bytes + at];
            dot += n * (four ? (q >> shift) & 15 : q);
        }
        y[r] += plain_half(scales[g * padded + r]) * in.scale[g] * static_cast<float>(dot);
        if (four) y[r] += plain_half(scales[(groups + g) * padded + r]) * in.sum[g];
    }
}

#ifdef ACTLAS_X86

// -- packed columns: VNNI -----------------------------------------------------------------------------

// Four columns of 64 rows -> four vectors of 16 rows, the four bytes of a row side by side.
ACTLAS_VNNI inline void interleave(const __m512i *c, __m512i *out) {
    const __m512i ab = _mm512_unpacklo_epi8(c[0], c[1]), AB = _mm512_unpackhi_epi8(c[0], c[1]);
    const __m512i cd = _mm512_unpacklo_epi8(c[2], c[3]), CD = _mm512_unpackhi_epi8(c[2], c[3]);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(AB, CD);
    out[3] = _mm512_unpackhi_epi16(AB, CD);
}

ACTLAS_VNNI inline __m512 sixteen(const std::uint16_t *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
}

// Up to 32 active inputs of a group, four at a time: where the columns are, and their integers.
struct Quads {
    const std::uint8_t *column[kGroup];
    std::int32_t high[kGroup / 4], low[kGroup / 4];
    std::size_t count;
};

Quads quads_of(const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count) {
    Quads q{};
    q.count = (count + 3) / 4;
    const std::size_t bytes = w.column_bytes();
    for (std::size_t i = 0; i < 4 * q.count; ++i) {
        const std::size_t j = static_cast<std::size_t>(active[std::min(i, count - 1)]);
        q.column[i] = w.data + j * bytes;
        std::int8_t high = i < count ? in.high[j] : std::int8_t{0};
        std::int8_t low = i < count && in.low ? in.low[j] : std::int8_t{0};
        std::memcpy(reinterpret_cast<char *>(q.high) + i, &high, 1);
        std::memcpy(reinterpret_cast<char *>(q.low) + i, &low, 1);
    }
    return q;
}

template <bool two>
ACTLAS_VNNI void vnni_group(const Columns &w, const Inputs &in, const Quads &quads, std::size_t g, float *y) {
    const bool four = w.format == ColumnFormat::q4;
    const std::size_t padded = w.padded(), groups = w.columns / kGroup, tiles = padded / 64;
    const auto *scales = reinterpret_cast<const std::uint16_t *>(w.data + w.columns * w.column_bytes()) + g * padded;
    const auto *minima = scales + groups * padded;
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512 step = _mm512_set1_ps(in.scale[g]), sum = _mm512_set1_ps(in.sum[g]);
    // q4: two halves of a tile of 128 at a time.
    for (std::size_t tile = 0; tile < tiles; tile += four ? 2 : 1) {
        const std::size_t halves = four ? 2 : 1, at = four ? tile / 2 * 64 : tile * 64;
        __m512i high[2][4], low[2][4];
        for (std::size_t h = 0; h < halves; ++h) {
            for (int i = 0; i < 4; ++i) {
                high[h][i] = _mm512_setzero_si512();
                low[h][i] = four ? _mm512_setzero_si512() : _mm512_set1_epi32(-128 * in.whole[g]);
            }
        }
        for (std::size_t k = 0; k < quads.count; ++k) {
            __m512i bytes[4], rows[4];
            const __m512i x = _mm512_set1_epi32(quads.high[k]), rest = _mm512_set1_epi32(quads.low[k]);
            for (int i = 0; i < 4; ++i) bytes[i] = _mm512_loadu_si512(quads.column[4 * k + i] + at);
            if (four) {
                __m512i part[4];
                for (int i = 0; i < 4; ++i) part[i] = _mm512_and_si512(bytes[i], mask);
                interleave(part, rows);
                for (int i = 0; i < 4; ++i) {
                    high[0][i] = _mm512_dpbusd_epi32(high[0][i], rows[i], x);
                    if (two) low[0][i] = _mm512_dpbusd_epi32(low[0][i], rows[i], rest);
                }
                for (int i = 0; i < 4; ++i) part[i] = _mm512_and_si512(_mm512_srli_epi16(bytes[i], 4), mask);
                interleave(part, rows);
                for (int i = 0; i < 4; ++i) {
                    high[1][i] = _mm512_dpbusd_epi32(high[1][i], rows[i], x);
                    if (two) low[1][i] = _mm512_dpbusd_epi32(low[1][i], rows[i], rest);
                }
            } else {
                interleave(bytes, rows);
                for (int i = 0; i < 4; ++i) {
                    high[0][i] = _mm512_dpbusd_epi32(high[0][i], rows[i], x);
                    if (two) low[0][i] = _mm512_dpbusd_epi32(low[0][i], rows[i], rest);
                }
            }
        }
        for (std::size_t h = 0; h < halves; ++h) {
            for (int i = 0; i < 4; ++i) {
                const std::size_t r = (tile + h) * 64 + 16 * static_cast<std::size_t>(i);
                const __m512i top = two ? _mm512_slli_epi32(high[h][i], 7) : high[h][i];
                const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(top, low[h][i]));
                __m512 v = _mm512_loadu_ps(y + r);
                v = _mm512_fmadd_ps(dot, _mm512_mul_ps(sixteen(scales + r), step), v);
                if (four) v = _mm512_fmadd_ps(sixteen(minima + r), sum, v);
                _mm512_storeu_ps(y + r, v);
            }
        }
    }
}

#endif

}  // namespace

std::size_t find_active(const float *x, std::size_t n, std::int32_t *active, std::int32_t *starts) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        if (i % kGroup == 0) starts[i / kGroup] = static_cast<std::int32_t>(count);
        active[count] = static_cast<std::int32_t>(i);
        count += x[i] != 0.0f;
    }
    starts[(n + kGroup - 1) / kGroup] = static_cast<std::int32_t>(count);
    return count;
}

void add_columns(const Columns &w, const Inputs &in, const std::int32_t *active, const std::int32_t *starts,
                 std::size_t begin, std::size_t end, float *y, Level level) {
    if (begin >= end) return;
    if (w.format == ColumnFormat::f32 || w.format == ColumnFormat::bf16) {
        const auto from = static_cast<std::size_t>(starts[begin]), to = static_cast<std::size_t>(starts[end]);
        either_columns_for(level)(w, in.x, active + from, to - from, y);
        return;
    }
    const std::size_t bytes = w.column_bytes();
    for (std::size_t g = begin; g < end; ++g) {
        const auto from = static_cast<std::size_t>(starts[g]), to = static_cast<std::size_t>(starts[g + 1]);
        if (from == to) continue;
        if (g + 1 < end) {  // what comes next is fetched meanwhile; the processor cannot guess the gaps
            for (auto a = to; a < static_cast<std::size_t>(starts[g + 2]); ++a) {
                fetch(w.data + static_cast<std::size_t>(active[a]) * bytes, bytes);
            }
        }
#ifdef ACTLAS_X86
        if (level == Level::avx512 && has_vnni()) {
            const Quads quads = quads_of(w, in, active + from, to - from);
            if (in.low)
                vnni_group<true>(w, in, quads, g, y);
            else
                vnni_group<false>(w, in, quads, g, y);
            continue;
        }
#endif
        plain_group(w, in, active + from, to - from, g, y);
    }
}

}  // namespace actlas
