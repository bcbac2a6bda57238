// Which of a row's scores are the largest, without sorting them.
#pragma once

#include "common.hpp"

namespace actlas {

// mask[row, i] = 1 for the k largest of the d scores of each of n rows, else 0. Equal scores: the first come first;
// NaN counts as larger than every number, and -0 as 0. 0 < k <= d.
void topk_mask(const float *scores, std::size_t n, std::size_t d, std::size_t k, std::uint8_t *mask, int threads,
               Level level);

}  // namespace actlas
