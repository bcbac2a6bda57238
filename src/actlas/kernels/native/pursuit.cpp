#include "pursuit.hpp"

#include <cmath>

namespace actlas {
namespace {

// c -= step * g (g may be null), and the first index of the largest |c|.
template <std::size_t lanes>
ACTLAS_INLINE std::size_t subtract_and_find(float *c, const float *g, float step, std::size_t m) {
    using Floats = typename Vec<lanes>::Floats;
    using Ints = typename Vec<lanes>::Ints;
    const Ints magnitude = Ints{} + 0x7fffffff;
    Floats best = Floats{} - 1.0f, x, y;
    Ints at{}, now;
    for (std::size_t i = 0; i < lanes; ++i) now[i] = static_cast<std::int32_t>(i);
    std::size_t i = 0;
    for (; i + lanes <= m; i += lanes) {
        load(x, c + i);
        if (g) {
            load(y, g + i);
            x -= y * step;
            store(c + i, x);
        }
        const Floats size = (Floats)((Ints)x & magnitude);
        const Ints more = size > best;
        best = more ? size : best;
        at = more ? now : at;
        now += static_cast<std::int32_t>(lanes);
    }
    float top = -1.0f;
    std::size_t found = 0;
    for (std::size_t j = 0; j < lanes; ++j) {
        const std::size_t index = static_cast<std::size_t>(at[j]);
        if (best[j] > top || (best[j] == top && index < found)) {
            top = best[j];
            found = index;
        }
    }
    for (; i < m; ++i) {
        if (g) c[i] -= step * g[i];
        if (std::fabs(c[i]) > top) {
            top = std::fabs(c[i]);
            found = i;
        }
    }
    return found;
}

template <std::size_t lanes>
ACTLAS_INLINE void pursue_rows(float *correlations, std::size_t begin, std::size_t end, std::size_t k,
                               const Matrix &gram, std::int64_t *picks, float *steps) {
    const std::size_t m = gram.columns;
    for (std::size_t i = begin; i < end; ++i) {
        float *c = correlations + i * m;
        std::size_t pick = subtract_and_find<lanes>(c, nullptr, 0.0f, m);
        for (std::size_t j = 0; j < k; ++j) {
            const float step = c[pick];
            picks[i * k + j] = static_cast<std::int64_t>(pick);
            steps[i * k + j] = step;
            if (j + 1 < k) pick = subtract_and_find<lanes>(c, gram.row(pick), step, m);
        }
    }
}
ACTLAS_FOR_LEVELS(pursue_rows,
                  (float *correlations, std::size_t begin, std::size_t end, std::size_t k, const Matrix &gram,
                   std::int64_t *picks, float *steps),
                  (correlations, begin, end, k, gram, picks, steps))

}  // namespace

void pursue(float *correlations, std::size_t n, std::size_t k, const Matrix &gram, std::int64_t *picks,
            float *steps, int threads, Level level) {
    const auto loop = pursue_rows_for(level);
    split(n, k * gram.columns, threads,
          [&](std::size_t begin, std::size_t end) { loop(correlations, begin, end, k, gram, picks, steps); });
}

}  // namespace actlas
