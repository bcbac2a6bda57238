// Matching pursuit on correlations. See pursuit.py.
#pragma once

#include "sparse_codes.hpp"

namespace actlas {

// k steps for each row of correlations [n, m] (contiguous, used up): picks and steps [n, k].
void pursue(float *correlations, std::size_t n, std::size_t k, const Matrix &gram, std::int64_t *picks,
            float *steps, int threads, Level level);

}  // namespace actlas
