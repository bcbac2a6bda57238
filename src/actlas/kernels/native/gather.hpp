// Scattered rows of a large matrix as float32. See gather.py.
#pragma once

#include "common.hpp"

namespace actlas {

enum class Number { float32, float16, bfloat16, int8 };

// out[r] = scales[indices_r] * source[indices_r]; `stride` in elements; scales may be null.
void gather_rows(const void *source, Number number, std::size_t d, std::size_t stride, const float *scales,
                 const std::int64_t *indices, std::size_t count, float *out, int threads, Level level);

}  // namespace actlas
