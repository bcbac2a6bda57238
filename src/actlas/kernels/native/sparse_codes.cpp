#include "sparse_codes.hpp"

#include <cmath>
#include <type_traits>

namespace actlas {
namespace {

// -- top k ------------------------------------------------------------------------------------------------

// An integer in the order of the numbers: -0 is 0 and NaN is above infinity.
inline std::int32_t ordered(float x) {
    x += 0.0f;  // -0 becomes 0
    std::int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fffffff : bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Ascending: the largest number first, of equal ones the first.
inline std::int64_t rank_of(float x, std::size_t index) {
    return static_cast<std::int64_t>(~ordered(x)) * (std::int64_t{1} << 32) + static_cast<std::int64_t>(index);
}

// A number between two: half way, or half way in the order of all floats where an end is infinite.
float between(float low, float high) {
    if (std::isfinite(low) && std::isfinite(high)) return 0.5f * low + 0.5f * high;
    const std::int64_t middle = (static_cast<std::int64_t>(ordered(low)) + ordered(high)) / 2;
    const std::int32_t order = static_cast<std::int32_t>(middle), bits = order < 0 ? order ^ 0x7fffffff : order;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const float *from) {
    load(v, from);
}
template <std::size_t lanes> ACTLAS_INLINE void widen(typename Vec<lanes>::Floats &v, const std::uint16_t *from) {
    typename Vec<lanes>::Halves halves;
    load(halves, from);
    v = (typename Vec<lanes>::Floats)(__builtin_convertvector(halves, typename Vec<lanes>::Bits) << 16);
}
inline float widen_one(float x) { return x; }
inline float widen_one(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

struct TopkBuffers {
    TopkBuffers(std::size_t m, std::size_t k) : tops(4 * k + 16), places(m + 32), ranks(m), sorted(m) {}
    std::vector<float> tops;           // maxima of groups of entries
    std::vector<std::int32_t> places;  // of entries that reach the bound
    std::vector<std::int64_t> ranks, sorted;
};

// The maxima of `groups` groups of entries; false if there is a NaN.
template <std::size_t lanes, class T>
ACTLAS_INLINE bool group_maxima(const T *x, std::size_t m, std::size_t groups, float *tops) {
    typename Vec<lanes>::Floats v, top;
    typename Vec<lanes>::Ints odd{};
    const std::size_t whole = m / groups * groups;
    for (std::size_t g = 0; g < groups; g += lanes) {
        widen<lanes>(top, x + g);
        odd |= top != top;
        for (std::size_t i = g + groups; i < whole; i += groups) {
            widen<lanes>(v, x + i);
            odd |= v != v;
            top = v > top ? v : top;
        }
        store(tops + g, top);
    }
    bool plain = true;
    for (std::size_t i = whole; i < m; ++i) {
        const float one = widen_one(x[i]);
        plain = plain && one == one;
        if (one > tops[i - whole]) tops[i - whole] = one;
    }
    for (std::size_t i = 0; i < lanes; ++i) plain = plain && !odd[i];
    return plain;
}

// A number that at least k of the maxima reach, and not many more.
template <std::size_t lanes> ACTLAS_INLINE float bound_of(const float *tops, std::size_t groups, std::size_t k) {
    typename Vec<lanes>::Floats low, high, v;
    load(low, tops);
    high = low;
    for (std::size_t g = lanes; g < groups; g += lanes) {
        load(v, tops + g);
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    float under = low[0], over = high[0];
    for (std::size_t i = 1; i < lanes; ++i) {
        under = std::min(under, low[i]);
        over = std::max(over, high[i]);
    }
    for (int step = 0; step < 20; ++step) {
        const float middle = between(under, over);
        if (!(middle > under && middle < over)) break;
        typename Vec<lanes>::Ints reached{};
        for (std::size_t g = 0; g < groups; g += lanes) {
            load(v, tops + g);
            reached -= v >= middle;
        }
        std::size_t count = 0;
        for (std::size_t i = 0; i < lanes; ++i) count += static_cast<std::size_t>(reached[i]);
        if (count < k) {
            over = middle;
            continue;
        }
        under = middle;
        if (count <= k + k / 8) break;
    }
    return under;
}

// The places of the entries that reach the bound; `places` has room for one vector more than m.
template <std::size_t lanes, class T>
ACTLAS_INLINE std::size_t reaching(const T *x, std::size_t m, float bound, std::int32_t *places) {
    typename Vec<lanes>::Floats v;
    std::size_t count = 0, i = 0;
    for (; i + lanes <= m; i += lanes) {
        widen<lanes>(v, x + i);
        const typename Vec<lanes>::Ints hit = v >= bound;
        // Narrowing costs one instruction with 16 lanes and many with fewer.
        using Flag = std::conditional_t<lanes == 16, std::int8_t, std::int32_t>;
        typedef Flag Flags __attribute__((vector_size(lanes * sizeof(Flag))));
        const Flags narrow = __builtin_convertvector(hit, Flags);
        std::uint64_t words[sizeof(Flags) / 8], some = 0;
        std::memcpy(words, &narrow, sizeof narrow);
        for (const std::uint64_t word : words) some |= word;
        if (!some) continue;
        Flag flags[lanes];
        std::memcpy(flags, &narrow, sizeof narrow);
        for (std::size_t j = 0; j < lanes; ++j) {  // without branches: where the hit is cannot be foretold
            places[count] = static_cast<std::int32_t>(i + j);
            count += static_cast<std::size_t>(-flags[j]);
        }
    }
    for (; i < m; ++i)
        if (widen_one(x[i]) >= bound) places[count++] = static_cast<std::int32_t>(i);
    return count;
}

// The first k of the ranks in order. A few are counted against each other, which needs no branches.
ACTLAS_INLINE const std::int64_t *first_ranks(TopkBuffers &buffers, std::size_t count, std::size_t k) {
    std::int64_t *ranks = buffers.ranks.data(), *sorted = buffers.sorted.data();
    if (count > 128) {
        std::nth_element(ranks, ranks + (k - 1), ranks + count);
        std::sort(ranks, ranks + k);
        return ranks;
    }
    for (std::size_t a = 0; a < count; ++a) {
        std::int64_t before = 0;
        for (std::size_t b = 0; b < count; ++b) before += ranks[b] < ranks[a];
        sorted[before] = ranks[a];
    }
    return sorted;
}

// Entries that are at least the k-th largest of the maxima of many groups are few, and the k largest are
// among them: they are found in one pass and only they are sorted.
template <std::size_t lanes, class T>
ACTLAS_INLINE void topk_row(const T *x, std::size_t m, std::size_t k, bool relu, float *values,
                            std::int64_t *indices, TopkBuffers &buffers) {
    const std::size_t groups = (4 * k + lanes - 1) / lanes * lanes;
    std::int64_t *ranks = buffers.ranks.data();
    std::size_t count = m;
    if (groups * 2 <= m && group_maxima<lanes>(x, m, groups, buffers.tops.data())) {
        const float bound = bound_of<lanes>(buffers.tops.data(), groups, k);
        const std::int32_t *places = buffers.places.data();
        count = reaching<lanes>(x, m, bound, buffers.places.data());
        for (std::size_t j = 0; j < count; ++j)
            ranks[j] = rank_of(widen_one(x[places[j]]), static_cast<std::size_t>(places[j]));
    } else {
        for (std::size_t i = 0; i < m; ++i) ranks[i] = rank_of(widen_one(x[i]), i);
    }
    const std::int64_t *first = first_ranks(buffers, count, k);
    for (std::size_t j = 0; j < k; ++j) {
        const std::int64_t index = first[j] & 0xffffffff;
        const float v = widen_one(x[index]);
        indices[j] = index;
        values[j] = relu && v < 0.0f ? 0.0f : v;
    }
}

template <std::size_t lanes, class T>
ACTLAS_INLINE void topk_rows(const T *x, std::size_t begin, std::size_t end, std::size_t m, std::size_t stride,
                             std::size_t k, bool relu, float *values, std::int64_t *indices, TopkBuffers &buffers) {
    for (std::size_t i = begin; i < end; ++i)
        topk_row<lanes>(x + i * stride, m, k, relu, values + i * k, indices + i * k, buffers);
}

#define ACTLAS_TOPK(NAME, TYPE)                                                                                \
    template <std::size_t lanes>                                                                               \
    ACTLAS_INLINE void NAME(const TYPE *x, std::size_t begin, std::size_t end, std::size_t m,                  \
                            std::size_t stride, std::size_t k, bool relu, float *values, std::int64_t *indices, \
                            TopkBuffers &buffers) {                                                            \
        topk_rows<lanes>(x, begin, end, m, stride, k, relu, values, indices, buffers);                         \
    }                                                                                                          \
    ACTLAS_FOR_LEVELS(NAME,                                                                                    \
                      (const TYPE *x, std::size_t begin, std::size_t end, std::size_t m, std::size_t stride,   \
                       std::size_t k, bool relu, float *values, std::int64_t *indices, TopkBuffers &buffers),  \
                      (x, begin, end, m, stride, k, relu, values, indices, buffers))
ACTLAS_TOPK(topk_float, float)
ACTLAS_TOPK(topk_bfloat, std::uint16_t)

auto topk_loop(const float *, Level level) { return topk_float_for(level); }
auto topk_loop(const std::uint16_t *, Level level) { return topk_bfloat_for(level); }

// -- decoder and gradients --------------------------------------------------------------------------------

template <std::size_t lanes>
ACTLAS_INLINE void decode_rows(const std::int64_t *indices, const float *values, std::size_t begin,
                               std::size_t end, std::size_t k, const Matrix &weight, float *y) {
    for (std::size_t i = begin; i < end; ++i)
        weighted_sum<lanes>(weight, indices + i * k, values + i * k, k, y + i * weight.columns, false);
}
ACTLAS_FOR_LEVELS(decode_rows,
                  (const std::int64_t *indices, const float *values, std::size_t begin, std::size_t end,
                   std::size_t k, const Matrix &weight, float *y),
                  (indices, values, begin, end, k, weight, y))

template <std::size_t lanes>
ACTLAS_INLINE void dot_rows(const std::int64_t *indices, std::size_t begin, std::size_t end, std::size_t k,
                            const Matrix &rows, const Matrix &weight, float *g) {
    using Floats = typename Vec<lanes>::Floats;
    const std::size_t d = rows.columns;
    for (std::size_t i = begin; i < end; ++i) {
        const float *row = rows.row(i);
        for (std::size_t j = 0; j < k; ++j) {
            const float *w = weight.row(indices[i * k + j]);
            Floats sum[4] = {}, a, b;
            std::size_t c = 0;
            for (; c + 4 * lanes <= d; c += 4 * lanes)
                for (std::size_t v = 0; v < 4; ++v) {
                    load(a, row + c + v * lanes);
                    load(b, w + c + v * lanes);
                    sum[v] += a * b;
                }
            for (; c + lanes <= d; c += lanes) {
                load(a, row + c);
                load(b, w + c);
                sum[0] += a * b;
            }
            sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            float total = 0.0f;
            for (std::size_t v = 0; v < lanes; ++v) total += sum[0][v];
            for (; c < d; ++c) total += row[c] * w[c];
            g[i * k + j] = total;
        }
    }
}
ACTLAS_FOR_LEVELS(dot_rows,
                  (const std::int64_t *indices, std::size_t begin, std::size_t end, std::size_t k,
                   const Matrix &rows, const Matrix &weight, float *g),
                  (indices, begin, end, k, rows, weight, g))

template <std::size_t lanes>
ACTLAS_INLINE void outer_rows(const ByLatent &entries, std::size_t begin, std::size_t end, const Matrix &rows,
                              float *gradient, bool add) {
    const std::size_t d = rows.columns;
    for (std::size_t l = begin; l < end; ++l) {
        const std::uint32_t first = entries.first[l], count = entries.first[l + 1] - first;
        if (add && count == 0) continue;
        weighted_sum<lanes>(rows, entries.row.data() + first, entries.coefficient.data() + first, count,
                            gradient + l * d, add);
    }
}
ACTLAS_FOR_LEVELS(outer_rows,
                  (const ByLatent &entries, std::size_t begin, std::size_t end, const Matrix &rows,
                   float *gradient, bool add),
                  (entries, begin, end, rows, gradient, add))

}  // namespace

template <class T>
void topk(const T *x, std::size_t n, std::size_t m, std::size_t stride, std::size_t k, bool relu, float *values,
          std::int64_t *indices, int threads, Level level) {
    const auto loop = topk_loop(x, level);
    split(n, m, threads, [&](std::size_t begin, std::size_t end) {
        TopkBuffers buffers(m, k);
        loop(x, begin, end, m, stride, k, relu, values, indices, buffers);
    });
}
template void topk<float>(const float *, std::size_t, std::size_t, std::size_t, std::size_t, bool, float *,
                          std::int64_t *, int, Level);
template void topk<std::uint16_t>(const std::uint16_t *, std::size_t, std::size_t, std::size_t, std::size_t, bool,
                                  float *, std::int64_t *, int, Level);

void sparse_decode(const std::int64_t *indices, const float *values, std::size_t n, std::size_t k,
                   const Matrix &weight, float *y, int threads, Level level) {
    const auto loop = decode_rows_for(level);
    split(n, k * weight.columns, threads,
          [&](std::size_t begin, std::size_t end) { loop(indices, values, begin, end, k, weight, y); });
}

void gather_dot(const std::int64_t *indices, std::size_t k, const Matrix &rows, const Matrix &weight, float *g,
                int threads, Level level) {
    const auto loop = dot_rows_for(level);
    split(rows.rows, k * rows.columns, threads,
          [&](std::size_t begin, std::size_t end) { loop(indices, begin, end, k, rows, weight, g); });
}

ByLatent::ByLatent(const std::int64_t *indices, const float *coefficients, std::size_t n, std::size_t k,
                   std::size_t m)
    : first(m + 1) {
    for (std::size_t e = 0; e < n * k; ++e)
        if (coefficients[e] != 0.0f) ++first[indices[e] + 1];
    for (std::size_t l = 0; l < m; ++l) first[l + 1] += first[l];
    row.resize(first[m]);
    coefficient.resize(first[m]);
    std::vector<std::uint32_t> next(first.begin(), first.end() - 1);
    for (std::size_t i = 0, e = 0; i < n; ++i)
        for (std::size_t j = 0; j < k; ++j, ++e)
            if (coefficients[e] != 0.0f) {
                const std::uint32_t at = next[indices[e]]++;
                row[at] = static_cast<std::int64_t>(i);
                coefficient[at] = coefficients[e];
            }
}

std::size_t ByLatent::part(std::size_t i, std::size_t parts, std::size_t per_latent) const {
    const std::size_t m = first.size() - 1, total = first[m] + per_latent * m, wanted = total * i / parts;
    std::size_t low = 0, high = m;
    while (low < high) {
        const std::size_t middle = (low + high) / 2;
        if (first[middle] + per_latent * middle < wanted)
            low = middle + 1;
        else
            high = middle;
    }
    return i == parts ? m : low;
}

void scatter_outer(const ByLatent &entries, const Matrix &rows, std::size_t m, float *gradient, bool add,
                   int threads, Level level) {
    const auto loop = outer_rows_for(level);
    const std::size_t work = (entries.row.size() + m) * rows.columns;
    const std::size_t parts = work < (1 << 18) ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    run_parts(parts, [&](std::size_t i) {
        loop(entries, entries.part(i, parts, 2), entries.part(i + 1, parts, 2), rows, gradient, add);
    });
}

}  // namespace actlas
