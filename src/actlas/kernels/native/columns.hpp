// Products that read only the columns of a weight whose input is not skipped.
//
//   y = sum over active j of x_j W[:, j]
//
// A column is contiguous, so a skipped input is a run of memory that is never fetched:
//
//   f32, bf16   columns in order, rows in order
//   q8          bytes, rows padded to 64, then float16 scale [groups, rows]               w = scale * (q - 128)
//   q4          nibbles, rows padded to 128, then float16 scale and minimum [groups, rows]  w = scale * q + minimum
//
// Packed rows are taken 64 at a time (a q4 byte holds row r and row r + 64 of a tile of 128). Within 64 rows,
// byte 16 L + 4 i + e is row 16 i + 4 L + e: when the bytes of four columns are interleaved, which the
// processor does in lanes of 16 bytes, the sums come out in order.
//
// Threads share out the columns, not the rows, so that they stay balanced whatever the number of rows.
#pragma once

#include "packed.hpp"

namespace actlas {

enum class ColumnFormat { f32 = 0, bf16 = 1, q8 = 2, q4 = 3 };

struct Columns {
    ColumnFormat format = ColumnFormat::f32;
    const std::uint8_t *data = nullptr;
    std::size_t rows = 0, columns = 0;

    std::size_t padded() const {
        const std::size_t unit = format == ColumnFormat::q4 ? 128 : format == ColumnFormat::q8 ? 64 : 1;
        return (rows + unit - 1) / unit * unit;
    }
    std::size_t column_bytes() const {
        const std::size_t n = padded();
        return format == ColumnFormat::f32 ? 4 * n : format == ColumnFormat::bf16 ? 2 * n
               : format == ColumnFormat::q8 ? n : n / 2;
    }
    std::size_t bytes() const {
        const std::size_t groups = columns / kGroup;
        const std::size_t extra = format == ColumnFormat::q4 ? 4 : format == ColumnFormat::q8 ? 2 : 0;
        return columns * column_bytes() + extra * groups * padded();
    }
};

// Adds to y [padded rows] the products of the groups of 32 inputs `begin` to `end` (the last may be short
// for float formats) of one token. `active` are the input numbers in order, those of group g from starts[g] to
// starts[g + 1]. `inputs` must be quantised for packed formats, with zeros where an input is skipped.
void add_columns(const Columns &w, const Inputs &inputs, const std::int32_t *active, const std::int32_t *starts,
                 std::size_t begin, std::size_t end, float *y, Level level);

// Writes the numbers of the entries that are not zero, and where each group of 32 starts; returns how many.
std::size_t find_active(const float *x, std::size_t n, std::int32_t *active, std::int32_t *starts);

}  // namespace actlas
