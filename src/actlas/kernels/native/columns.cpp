#include "columns.hpp"

#include <stdexcept>

#include "half.hpp"
#include "vnni.hpp"

namespace actlas {
namespace {

// -- float columns ------------------------------------------------------------------------------------

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const std::uint16_t *from) {
    widen_bfloat16<lanes>(v, from);
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

// What comes next is fetched into the second cache, which can wait for more lines at once than the first: half
// again as fast here, and better than to leave it to the processor, which cannot guess the gaps.
ACTLAS_INLINE void fetch(const void *from) { __builtin_prefetch(from, 0, 2); }

// Sixteen columns at a time: the more of them, the more of the memory's banks are at work.
template <std::size_t lanes, class T>
ACTLAS_INLINE void float_columns(const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                                 float *y) {
    using Floats = typename Vec<lanes>::Floats;
    constexpr std::size_t at_once = 16, line = 64 / sizeof(T);
    const std::size_t rows = w.rows, stride = w.stride();
    const T *column[at_once], *next[at_once];
    const auto find = [&](std::size_t a, const T **into) {  // missing ones repeat the last
        for (std::size_t i = 0; i < at_once; ++i) {
            const auto j = static_cast<std::size_t>(active[std::min(a + i, count - 1)]);
            into[i] = reinterpret_cast<const T *>(w.data + j * stride);
        }
    };
    if (count > 0) find(0, next);
    for (std::size_t a = 0; a < count; a += at_once) {
        std::copy(next, next + at_once, column);
        const bool more = a + at_once < count;
        if (more) find(a + at_once, next);
        const std::size_t n = std::min(at_once, count - a);
        for (std::size_t t = 0; t < in.tokens; ++t) {
            float factor[at_once], *out = y + t * rows;
            for (std::size_t i = 0; i < at_once; ++i) {
                factor[i] = i < n ? in.x[t * w.columns + static_cast<std::size_t>(active[a + i])] : 0.0f;
            }
            const bool ahead = more && t == 0;
            std::size_t r = 0;
            for (; r + line <= rows; r += line) {
                if (ahead) {
                    for (std::size_t i = 0; i < at_once; ++i) fetch(next[i] + r);
                }
                for (std::size_t l = 0; l < line; l += lanes) {
                    Floats sum, v;
                    load(sum, out + r + l);
                    for (std::size_t i = 0; i < at_once; ++i) {
                        widen<lanes>(v, column[i] + r + l);
                        sum += v * factor[i];
                    }
                    store(out + r + l, sum);
                }
            }
            for (; r < rows; ++r) {
                for (std::size_t i = 0; i < n; ++i) out[r] += one(column[i] + r) * factor[i];
            }
        }
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void either_columns(const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                                  float *y) {
    if (w.format == ColumnFormat::f32)
        float_columns<lanes, float>(w, in, active, count, y);
    else
        float_columns<lanes, std::uint16_t>(w, in, active, count, y);
}
ACTLAS_FOR_LEVELS(either_columns,
                  (const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count, float *y),
                  (w, in, active, count, y))

// -- packed columns: a plain loop ---------------------------------------------------------------------

// Rows of a line of 64 bytes go into their order within the tile once the sums are there.
template <std::size_t lanes>
ACTLAS_INLINE void plain_group(const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                               std::size_t g, float *y) {
    using Ints = typename Vec<lanes>::Ints;
    const std::size_t bits = w.bits(), fields = 8 / bits, mask = (std::size_t{1} << bits) - 1;
    const bool eight = bits == 8;
    const std::size_t padded = w.padded(), bytes = w.column_bytes(), runs = w.columns / kGroup;
    const auto *scales = reinterpret_cast<const std::uint16_t *>(w.data + w.columns * w.stride()) +
                         g * kGroup / w.group * padded;
    const auto *minima = scales + w.columns / w.group * padded;
    for (std::size_t line = 0; line < bytes; line += 64) {
        for (std::size_t t = 0; t < in.tokens; ++t) {
            for (std::size_t field = 0; field < fields; ++field) {
                alignas(64) std::int32_t dots[64] = {};
                for (std::size_t a = 0; a < count; ++a) {
                    const std::size_t j = static_cast<std::size_t>(active[a]), at = t * w.columns + j;
                    const std::int32_t n = in.low ? 128 * in.high[at] + in.low[at] : in.high[at];
                    const std::uint8_t *from = w.data + j * w.stride() + line;
                    for (std::size_t i = 0; i < 64; i += lanes) {
                        Ints sum;
                        load(sum, dots + i);
                        sum += ((widen_bytes<lanes>(from + i) >> static_cast<int>(bits * field)) &
                                static_cast<std::int32_t>(mask)) * n;
                        store(dots + i, sum);
                    }
                }
                const std::size_t at = t * runs + g, first = line * fields + 64 * field;
                for (std::size_t r = 0; r < 64; ++r) {
                    const std::size_t i = r / 16, lane = r % 16 / 4, e = r % 4;
                    std::int32_t dot = dots[16 * lane + 4 * i + e];
                    if (eight) dot -= 128 * in.whole[at];
                    float &out = y[t * padded + first + r];
                    out += half_to_float(scales[first + r]) * in.scale[at] * static_cast<float>(dot);
                    if (!eight) out += half_to_float(minima[first + r]) * in.sum[at];
                }
            }
        }
    }
}
ACTLAS_FOR_LEVELS(plain_group,
                  (const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count, std::size_t g,
                   float *y),
                  (w, in, active, count, g, y))

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

// The active inputs of a run of 32, four at a time: where the columns are, and their integers.
struct Quads {
    const std::uint8_t *column[kGroup];
    std::int32_t high[kMostTokens][kGroup / 4], low[kMostTokens][kGroup / 4];
    std::size_t count;
};

void fill_quads(Quads &q, const Columns &w, const Inputs &in, const std::int32_t *active, std::size_t count) {
    q.count = (count + 3) / 4;
    const std::size_t stride = w.stride();
    for (std::size_t i = 0; i < 4 * q.count; ++i) {
        q.column[i] = w.data + static_cast<std::size_t>(active[std::min(i, count - 1)]) * stride;
    }
    for (std::size_t t = 0; t < in.tokens; ++t) {
        std::int8_t high[kGroup], low[kGroup];
        for (std::size_t i = 0; i < 4 * q.count; ++i) {
            const std::size_t j = t * w.columns + static_cast<std::size_t>(active[std::min(i, count - 1)]);
            high[i] = i < count ? in.high[j] : std::int8_t{0};
            low[i] = i < count && in.low ? in.low[j] : std::int8_t{0};
        }
        std::memcpy(q.high[t], high, 4 * q.count);
        std::memcpy(q.low[t], low, 4 * q.count);
    }
}

// One run. While a line of its columns is multiplied, the same line of the next run's columns is fetched.
template <int bits, bool two>
ACTLAS_VNNI void vnni_group(const Columns &w, const Inputs &in, const Quads &quads, const Quads &next,
                            std::size_t g, float *y) {
    constexpr int fields = 8 / bits, together = fields > 2 ? 2 : fields;
    constexpr bool eight = bits == 8;
    const std::size_t padded = w.padded(), runs = w.columns / kGroup, bytes = w.column_bytes();
    const auto *scales = reinterpret_cast<const std::uint16_t *>(w.data + w.columns * w.stride()) +
                         g * kGroup / w.group * padded;
    const auto *minima = scales + w.columns / w.group * padded;
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1);
    for (std::size_t line = 0; line < bytes; line += 64) {
        for (std::size_t t = 0; t < in.tokens; ++t) {
            const std::size_t of = t * runs + g;
            const __m512 step = _mm512_set1_ps(in.scale[of]), sum = _mm512_set1_ps(in.sum[of]);
            for (int field = 0; field < fields; field += together) {
                __m512i high[together][4], low[together][4];
                for (int h = 0; h < together; ++h) {
                    for (int i = 0; i < 4; ++i) {
                        high[h][i] = _mm512_setzero_si512();
                        low[h][i] = eight ? _mm512_set1_epi32(-128 * in.whole[of]) : _mm512_setzero_si512();
                    }
                }
                for (std::size_t k = 0; k < quads.count; ++k) {
                    __m512i c[4], rows[4];
                    const __m512i x = _mm512_set1_epi32(quads.high[t][k]), rest = _mm512_set1_epi32(quads.low[t][k]);
                    if (t == 0 && field == 0 && k < next.count) {
                        for (int i = 0; i < 4; ++i) fetch(next.column[4 * k + static_cast<std::size_t>(i)] + line);
                    }
                    for (int i = 0; i < 4; ++i) c[i] = _mm512_loadu_si512(quads.column[4 * k + i] + line);
                    interleave(c, rows);
                    for (int i = 0; i < 4; ++i) {
                        for (int h = 0; h < together; ++h) {
                            const __m512i part =
                                eight ? rows[i]
                                      : _mm512_and_si512(_mm512_srl_epi32(rows[i], _mm_cvtsi32_si128(bits * (field + h))), mask);
                            add_dots(high[h][i], part, x);
                            if (two) add_dots(low[h][i], part, rest);
                        }
                    }
                }
                if (t == 0 && field == 0) {
                    for (std::size_t a = 4 * quads.count; a < 4 * next.count; ++a) fetch(next.column[a] + line);
                }
                for (int h = 0; h < together; ++h) {
                    for (int i = 0; i < 4; ++i) {
                        const std::size_t r = line * fields + 64 * static_cast<std::size_t>(field + h) +
                                              16 * static_cast<std::size_t>(i);
                        const __m512i top = two ? _mm512_slli_epi32(high[h][i], 7) : high[h][i];
                        const __m512 dot = _mm512_cvtepi32_ps(_mm512_add_epi32(top, low[h][i]));
                        float *out = y + t * padded + r;
                        __m512 v = _mm512_loadu_ps(out);
                        v = _mm512_fmadd_ps(dot, _mm512_mul_ps(sixteen_halves(scales + r), step), v);
                        if (!eight) v = _mm512_fmadd_ps(sixteen_halves(minima + r), sum, v);
                        _mm512_storeu_ps(out, v);
                    }
                }
            }
        }
    }
}

// Sixteen numbers at once are moved together in a register.
ACTLAS_VNNI std::size_t find_active_avx512(const float *x, std::size_t n, std::int32_t *active,
                                           std::int32_t *starts) {
    std::size_t count = 0;
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (std::size_t i = 0; i < n; i += 16) {
        if (i % kGroup == 0) starts[i / kGroup] = static_cast<std::int32_t>(count);
        const __mmask16 set = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const unsigned found = static_cast<unsigned>(__builtin_popcount(set));
        const auto mask = static_cast<__mmask16>((1u << found) - 1u);
        _mm512_mask_storeu_epi32(active + count, mask, _mm512_maskz_compress_epi32(set, number));
        count += found;
        number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    }
    return count;
}

template <bool two>
void any_group(const Columns &w, const Inputs &in, const Quads &quads, const Quads &next, std::size_t g, float *y) {
    if (w.format == ColumnFormat::q8)
        vnni_group<8, two>(w, in, quads, next, g, y);
    else if (w.format == ColumnFormat::q4)
        vnni_group<4, two>(w, in, quads, next, g, y);
    else
        vnni_group<2, two>(w, in, quads, next, g, y);
}

#endif

}  // namespace

ColumnFormat column_format_named(const std::string &name) {
    const char *const names[] = {"f32", "bf16", "q8", "q4", "q2"};
    for (int i = 0; i < 5; ++i) {
        if (name == names[i]) return static_cast<ColumnFormat>(i);
    }
    throw std::invalid_argument("format must be f32, bf16, q8, q4 or q2");
}

std::size_t find_active(const float *x, std::size_t n, std::int32_t *active, std::int32_t *starts) {
    std::size_t count = 0, first = 0;
#ifdef ACTLAS_X86
    if (best_level() == Level::avx512) {
        first = n / kGroup * kGroup;
        count = find_active_avx512(x, first, active, starts);
    }
#endif
    for (std::size_t i = first; i < n; ++i) {
        if (i % kGroup == 0) starts[i / kGroup] = static_cast<std::int32_t>(count);
        active[count] = static_cast<std::int32_t>(i);
        count += x[i] != 0.0f;
    }
    starts[(n + kGroup - 1) / kGroup] = static_cast<std::int32_t>(count);
    return count;
}

std::size_t find_active(const float *x, std::size_t tokens, std::size_t n, std::int32_t *active,
                        std::int32_t *starts) {
    if (tokens == 1) return find_active(x, n, active, starts);
    std::size_t count = 0;
    for (std::size_t i = 0; i < n; ++i) {
        if (i % kGroup == 0) starts[i / kGroup] = static_cast<std::int32_t>(count);
        active[count] = static_cast<std::int32_t>(i);
        bool any = false;
        for (std::size_t t = 0; t < tokens; ++t) any = any || x[t * n + i] != 0.0f;
        count += any;
    }
    starts[(n + kGroup - 1) / kGroup] = static_cast<std::int32_t>(count);
    return count;
}

std::size_t share_of_active(const std::int32_t *starts, std::size_t runs, std::size_t part, std::size_t parts) {
    if (part >= parts) return runs;
    const auto count = static_cast<std::size_t>(starts[runs]);
    const auto wanted = static_cast<std::int32_t>(count * part / parts);
    return static_cast<std::size_t>(std::lower_bound(starts, starts + runs, wanted) - starts);
}

void add_columns(const Columns &w, const Inputs &in, const std::int32_t *active, const std::int32_t *starts,
                 std::size_t begin, std::size_t end, float *y, Level level) {
    if (begin >= end) return;
    if (!w.packed()) {
        const auto from = static_cast<std::size_t>(starts[begin]), to = static_cast<std::size_t>(starts[end]);
        either_columns_for(level)(w, in, active + from, to - from, y);
        return;
    }
    const auto from = [&](std::size_t g) { return static_cast<std::size_t>(starts[g]); };
#ifdef ACTLAS_X86
    if (level == Level::avx512 && has_vnni()) {
        Quads both[2];
        std::size_t turn = 0;
        const auto busy = [&](std::size_t g) {  // the next run with active inputs
            while (g < end && from(g) == from(g + 1)) ++g;
            return g;
        };
        const auto fill = [&](std::size_t which, std::size_t g) {
            if (g < end)
                fill_quads(both[which], w, in, active + from(g), from(g + 1) - from(g));
            else
                both[which].count = 0;
        };
        std::size_t g = busy(begin);
        fill(turn, g);
        while (g < end) {
            const std::size_t after = busy(g + 1);
            fill(1 - turn, after);
            if (in.low)
                any_group<true>(w, in, both[turn], both[1 - turn], g, y);
            else
                any_group<false>(w, in, both[turn], both[1 - turn], g, y);
            turn = 1 - turn;
            g = after;
        }
        return;
    }
#endif
    const auto plain = plain_group_for(level);
    for (std::size_t g = begin; g < end; ++g) {
        if (from(g) != from(g + 1)) plain(w, in, active + from(g), from(g + 1) - from(g), g, y);
    }
}

}  // namespace actlas
