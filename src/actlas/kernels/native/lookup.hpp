// Products with binary-coded weights by looking up partial sums, without multiplying codes.
//
//   w[r, j] = offset[r, g] + sum over bits i of alpha[r, g, i] * s_i[r, j],     s = -1 or +1, g = j / group
//
// Four (or eight) inputs have 16 (256) signed sums. They are computed once and serve all rows: a row's signs are
// the key. Signs are kept for 32 inputs in a word, bit j for input j (1: +1); words lie as
// [columns / 32, rows / 16, bits, 16], alpha as [groups, rows / 16, bits, 16], offset as [groups, rows / 16, 16],
// rows padded to 16.
#pragma once

#include "common.hpp"

namespace actlas {

struct Binary {
    const std::uint32_t *signs = nullptr;
    const void *alpha = nullptr, *offset = nullptr;  // float16, or float32; offset may be null
    bool half = true;
    std::size_t rows = 0, columns = 0, group = 32, bits = 0;

    std::size_t blocks() const { return (rows + 15) / 16; }
};

// y [padded rows] of blocks of 16 rows `begin` to `end` = the product with x [columns].
void lookup(const Binary &w, const float *x, float *y, std::size_t begin, std::size_t end, Level level);

}  // namespace actlas
