// Linear layers whose weights are packed for one token, or a few, at a time.
//
// A product with one vector is bound by the memory that the weights take, so they are kept small and are
// read in order. Rows are taken 16 at a time. In blocks of 16 rows and 32 inputs:
//
//   q4   4 x 64 bytes of nibbles, float16 scale[16], float16 minimum[16]      w = scale * q + minimum
//   q8   8 x 64 bytes, float16 scale[16]                                      w = scale * (q - 128)
//
// Byte 4 r + c of vector i of a q8 block is row r, input 4 i + c; in a q4 block its low nibble is row r,
// input 4 i + c and its high nibble row r, input 16 + 4 i + c. So a vector holds four inputs of each of 16
// rows, and one instruction (VNNI) multiplies it with four bytes of the activation and adds up each row.
//
// f32 weights stay where they are, rows in order.
#pragma once

#include "common.hpp"

namespace actlas {

enum class Format { none = 0, f32 = 1, q8 = 2, q4 = 3 };

constexpr std::size_t kRows = 16, kGroup = 32, kQ4Block = 320, kQ8Block = 544, kMostTokens = 8;

struct Linear {
    Format format = Format::none;
    const void *data = nullptr;
    const float *bias = nullptr;
    std::size_t rows = 0, columns = 0;

    std::size_t blocks() const { return (rows + kRows - 1) / kRows; }
};

// Activations of up to 8 tokens: as they are, and as integers with a scale for each group of 32. An integer is
// one byte, or two: n = 128 * high + low with |high| <= 127 and -64 <= low < 64, so that |n| <= 16256 + 63 and
// a product costs two byte products. Two bytes cost little, because it is the weights that have to be fetched,
// and their rounding (2^-15 of the group's largest value) is far below that of the weights.
struct Inputs {
    const float *x = nullptr;      // [tokens, columns]
    std::int8_t *high = nullptr;   // [tokens, columns]
    std::int8_t *low = nullptr;    // [tokens, columns], or null: one byte
    float *scale = nullptr;        // [tokens, columns / 32]
    float *sum = nullptr;          // scale * sum of n
    std::int32_t *whole = nullptr; // sum of n
    std::size_t tokens = 0, columns = 0;
};

// Fills the integers of x: scale = max |x| / 127 (two bytes: / 16256) of the group, n = x / scale rounded.
void quantise(const Inputs &inputs, Level level);

// out[t * stride + row] = w x_t (+ bias) for the rows of blocks `begin` to `end`.
void apply_linear(const Linear &w, const Inputs &inputs, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end, Level level);

// Whether the byte kernels have their instructions here; without, a plain loop does the same sums.
bool has_vnni();

}  // namespace actlas
