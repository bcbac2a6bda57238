// Streaming statistics of activations: the loops. See statistics.py for what they compute and why.
#pragma once

#include "common.hpp"

namespace actlas {

// Power sums of channels; `thirds` and `fourths` may be null.
struct Moments {
    double *sums;
    double *squares;
    double *absmax;
    double *thirds;
    double *fourths;
};

// Adds contiguous rows [n, d] to the moments. Threads split the channels, so that the result does not
// depend on their number.
void accumulate(const float *rows, std::size_t n, std::size_t d, Moments moments, int threads, Level level);

// Logarithmic buckets with fixed edges. The bucket of x is the first k with |x| <= edges[k], or the last.
// A table over the leading bits of |x| gives the lowest bucket of its cell, and as many comparisons as a
// cell can span buckets (one, for a ratio above 1.008) find the rest: exactly what a binary search finds.
class LogBuckets {
  public:
    LogBuckets(const float *edges, std::size_t count);
    void add(const float *values, std::size_t n, std::int64_t *counts, int threads) const;
    std::size_t half() const { return edges_.size() - 1; }

  private:
    void add_range(const float *values, std::size_t n, std::int64_t *counts) const;
    std::vector<float> edges_;
    std::vector<std::int32_t> first_;
    std::int32_t steps_ = 0;
};

}  // namespace actlas
