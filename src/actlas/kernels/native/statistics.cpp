#include "statistics.hpp"

#include <cmath>
#include <limits>

namespace actlas {
namespace {

constexpr std::size_t kRows = 64;        // rows per block: 64 rows of a few hundred channels stay in L2
constexpr std::size_t kGroup = 8;        // channels that threads split at, a multiple of every vector below
constexpr std::size_t kSmall = 1 << 18;  // elements under which starting a thread costs more than it saves

// Vectors of `lanes` channels; `lanes` doubles fill one register of the instruction set.
template <std::size_t lanes> struct Vectors {
    typedef float Floats __attribute__((vector_size(lanes * sizeof(float))));
    typedef std::int32_t Ints __attribute__((vector_size(lanes * sizeof(std::int32_t))));
    typedef double Doubles __attribute__((vector_size(lanes * sizeof(double))));
};

template <class V, class T> [[gnu::always_inline]] inline void add_to(T *to, const V &more) {
    V v;
    std::memcpy(&v, to, sizeof v);
    v += more;
    std::memcpy(to, &v, sizeof v);
}

// A maximum that comparisons made ignores NaN, so a channel whose squares are NaN (which happens for
// NaN input only: squares are never negative, so infinities cannot cancel) gets NaN as its maximum.
[[gnu::always_inline]] inline void raise_absmax(double *absmax, double seen, double squares) {
    if (std::isnan(squares))
        *absmax = std::numeric_limits<double>::quiet_NaN();
    else if (seen > *absmax)
        *absmax = seen;
}

// Channels [begin, end) of rows [0, n); `higher` compiles in the third and fourth powers.
template <std::size_t lanes, bool higher>
[[gnu::always_inline]] inline void accumulate_channels(const float *rows, std::size_t n, std::size_t d,
                                                      std::size_t begin, std::size_t end, const Moments &m) {
    using Floats = typename Vectors<lanes>::Floats;
    using Ints = typename Vectors<lanes>::Ints;
    using Doubles = typename Vectors<lanes>::Doubles;
    const Ints magnitude = Ints{} + 0x7fffffff;
    for (std::size_t row = 0; row < n; row += kRows) {
        const std::size_t last = std::min(row + kRows, n);
        std::size_t c = begin;
        for (; c + lanes <= end; c += lanes) {
            Doubles s1{}, s2{}, s3{}, s4{};
            Floats top{};
            for (std::size_t r = row; r < last; ++r) {
                Floats x;
                std::memcpy(&x, rows + r * d + c, sizeof x);
                const Floats a = (Floats)((Ints)x & magnitude);
                top = a > top ? a : top;
                const Doubles y = __builtin_convertvector(x, Doubles);
                const Doubles y2 = y * y;
                s1 += y;
                s2 += y2;
                if (higher) {
                    s3 += y2 * y;
                    s4 += y2 * y2;
                }
            }
            add_to(m.sums + c, s1);
            add_to(m.squares + c, s2);
            if (higher && m.thirds) add_to(m.thirds + c, s3);
            if (higher && m.fourths) add_to(m.fourths + c, s4);
            for (std::size_t i = 0; i < lanes; ++i) raise_absmax(m.absmax + c + i, top[i], s2[i]);
        }
        for (; c < end; ++c) {
            double s1 = 0, s2 = 0, s3 = 0, s4 = 0, top = 0;
            for (std::size_t r = row; r < last; ++r) {
                const double y = rows[r * d + c];
                const double y2 = y * y;
                top = std::fabs(y) > top ? std::fabs(y) : top;
                s1 += y;
                s2 += y2;
                s3 += y2 * y;
                s4 += y2 * y2;
            }
            m.sums[c] += s1;
            m.squares[c] += s2;
            if (higher && m.thirds) m.thirds[c] += s3;
            if (higher && m.fourths) m.fourths[c] += s4;
            raise_absmax(m.absmax + c, top, s2);
        }
    }
}

using Loop = void (*)(const float *, std::size_t, std::size_t, std::size_t, std::size_t, const Moments &);

#define ACTLAS_LOOPS(NAME, LANES, TARGET)                                                                   \
    TARGET void NAME##_two(const float *rows, std::size_t n, std::size_t d, std::size_t begin,              \
                           std::size_t end, const Moments &m) {                                             \
        accumulate_channels<LANES, false>(rows, n, d, begin, end, m);                                       \
    }                                                                                                       \
    TARGET void NAME##_four(const float *rows, std::size_t n, std::size_t d, std::size_t begin,             \
                            std::size_t end, const Moments &m) {                                            \
        accumulate_channels<LANES, true>(rows, n, d, begin, end, m);                                        \
    }

ACTLAS_LOOPS(baseline, 2, )
#ifdef ACTLAS_X86
ACTLAS_LOOPS(avx2, 4, ACTLAS_AVX2)
ACTLAS_LOOPS(avx512, 8, ACTLAS_AVX512)
#endif

Loop loop_for(Level level, bool higher) {
    level = std::min(level, best_level());
#ifdef ACTLAS_X86
    if (level == Level::avx512) return higher ? avx512_four : avx512_two;
    if (level == Level::avx2) return higher ? avx2_four : avx2_two;
#endif
    return higher ? baseline_four : baseline_two;
}

constexpr int kCellShift = 16;  // leading 15 bits of |x|: the exponent and 7 of the mantissa
constexpr std::uint32_t kInfinity = 0x7f800000u;

}  // namespace

Level best_level() {
#ifdef ACTLAS_X86
    static const Level level = [] {
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
        return avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
    }();
    return level;
#else
    return Level::baseline;
#endif
}

void accumulate(const float *rows, std::size_t n, std::size_t d, Moments moments, int threads, Level level) {
    const Loop loop = loop_for(level, moments.thirds || moments.fourths);
    const std::size_t groups = (d + kGroup - 1) / kGroup;
    const std::size_t wanted = n * d < kSmall ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t parts = std::max<std::size_t>(1, std::min(wanted, groups));
    run_parts(parts, [&](std::size_t i) {
        const std::size_t begin = std::min(d, groups * i / parts * kGroup);
        const std::size_t end = std::min(d, groups * (i + 1) / parts * kGroup);
        loop(rows, n, d, begin, end, moments);
    });
}

LogBuckets::LogBuckets(const float *edges, std::size_t count) : edges_(edges, edges + count) {
    edges_.back() = std::numeric_limits<float>::infinity();  // the last bucket takes all that is beyond
    first_.resize((kInfinity >> kCellShift) + 1);
    for (std::size_t cell = 0; cell < first_.size(); ++cell) {
        const std::uint32_t bits = static_cast<std::uint32_t>(cell) << kCellShift;
        float lowest;
        std::memcpy(&lowest, &bits, sizeof lowest);
        const auto at = std::lower_bound(edges_.begin(), edges_.end(), lowest) - edges_.begin();
        first_[cell] = static_cast<std::int32_t>(at);
        if (cell) steps_ = std::max(steps_, first_[cell] - first_[cell - 1]);
    }
}

void LogBuckets::add_range(const float *values, std::size_t n, std::int64_t *counts) const {
    std::int64_t *middle = counts + half();
    for (std::size_t i = 0; i < n; ++i) {
        std::uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        const std::uint32_t magnitude = bits & 0x7fffffffu;
        if (magnitude > kInfinity) continue;  // NaN
        const float a = std::fabs(values[i]);
        std::int32_t k = first_[magnitude >> kCellShift];
        for (std::int32_t step = 0; step < steps_; ++step) k += a > edges_[k];  // no branch to mispredict
        const std::int32_t negative = -static_cast<std::int32_t>(bits >> 31);
        ++middle[(k ^ negative) - negative];
    }
}

void LogBuckets::add(const float *values, std::size_t n, std::int64_t *counts, int threads) const {
    const std::size_t parts = n < kSmall ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    const std::size_t size = 2 * half() + 1;
    std::vector<std::int64_t> partial((parts - 1) * size);
    run_parts(parts, [&](std::size_t i) {
        const std::size_t begin = n * i / parts, end = n * (i + 1) / parts;
        add_range(values + begin, end - begin, i ? partial.data() + (i - 1) * size : counts);
    });
    for (std::size_t i = 0; i < partial.size(); ++i) counts[i % size] += partial[i];
}

}  // namespace actlas
