// Products that read only the columns of a weight whose input is not skipped.
//
//   y = sum over active j of x_j W[:, j]
//
// A column is contiguous, so a skipped input is a run of memory that is never fetched:
//
//   f32, bf16   columns in order, rows in order
//   q8          bytes, rows padded to 64, then float16 scale [groups, rows]               w = scale * (q - 128)
//   q4          nibbles, rows padded to 128, then float16 scale and minimum [groups, rows]  w = scale * q + minimum
//   q2          two bits, rows padded to 256, then as q4
//
// Columns lie an odd number of lines of 64 bytes apart. A group is 32, 64 or 128 inputs that share a scale.
// Scales are read if one input of the group is active, so that with groups of 32 they are a fifth of the bytes
// of a dense q4 product, and a third of a half sparse one.
//
// Packed rows are taken 64 at a time (a q4 byte holds row r and row r + 64 of a tile of 128, a q2 byte four rows
// of a tile of 256, the first in the lowest bits). Within 64 rows, byte 16 L + 4 i + e is row 16 i + 4 L + e:
// when the bytes of four columns are interleaved, which the processor does in lanes of 16 bytes, the sums come
// out in order.
//
// Threads share out the columns, not the rows, so that they stay balanced whatever the number of rows.
#pragma once

#include "packed.hpp"

namespace actlas {

enum class ColumnFormat { f32 = 0, bf16 = 1, q8 = 2, q4 = 3, q2 = 4 };

struct Columns {
    ColumnFormat format = ColumnFormat::f32;
    const std::uint8_t *data = nullptr;
    std::size_t rows = 0, columns = 0, group = kGroup;

    bool packed() const { return format != ColumnFormat::f32 && format != ColumnFormat::bf16; }
    std::size_t bits() const {
        switch (format) {
            case ColumnFormat::f32: return 32;
            case ColumnFormat::bf16: return 16;
            case ColumnFormat::q8: return 8;
            case ColumnFormat::q4: return 4;
            case ColumnFormat::q2: return 2;
        }
        return 32;
    }
    std::size_t padded() const {
        const std::size_t unit = packed() ? 512 / bits() : 1;
        return (rows + unit - 1) / unit * unit;
    }
    std::size_t column_bytes() const { return padded() * bits() / 8; }
    // From column to column: an odd number of lines. An even one would put lines that are needed together into
    // few sets of the first cache, which then cannot hold them.
    std::size_t stride() const { return ((column_bytes() + 63) / 64 | 1) * 64; }
    std::size_t bytes() const {
        const std::size_t extra = !packed() ? 0 : format == ColumnFormat::q8 ? 2 : 4;
        return columns * stride() + extra * (columns / group) * padded();
    }
};

// Throws std::invalid_argument for a name that is none of these.
ColumnFormat column_format_named(const std::string &name);

// Adds to y [tokens, padded rows] the products of the runs of 32 inputs `begin` to `end` (the last may be short
// for float formats). `active` are the input numbers in order, those of run g from starts[g] to starts[g + 1].
// `inputs` must be quantised for packed formats, with zeros where an input is skipped. Several tokens share the active inputs: those that one of them
// needs.
void add_columns(const Columns &w, const Inputs &inputs, const std::int32_t *active, const std::int32_t *starts,
                 std::size_t begin, std::size_t end, float *y, Level level);

// Writes the numbers of the entries that are not zero, and where each group of 32 starts; returns how many.
std::size_t find_active(const float *x, std::size_t n, std::int32_t *active, std::int32_t *starts);

// The same for several tokens [tokens, n]: those that are not zero for one of them.
std::size_t find_active(const float *x, std::size_t tokens, std::size_t n, std::int32_t *active,
                        std::int32_t *starts);

// The first run of 32 that belongs to this of `parts` equal shares of the active inputs.
std::size_t share_of_active(const std::int32_t *starts, std::size_t runs, std::size_t part, std::size_t parts);

}  // namespace actlas
