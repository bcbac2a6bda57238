// Linear layers whose weights are packed for one token, or a few, at a time.
//
// A product with one vector is bound by the memory that the weights take, so they are kept small and are
// read in order. Rows are taken 16 at a time, inputs 32 at a time, in 64 vectors of bits:
//
//   q8   8 x 64 bytes
//   q4   4 x 64 bytes of nibbles
//   q3   the lower two bits as q2, then 64 bytes of the third bits
//   q2   2 x 64 bytes, two bits each
//   f4   as q4; the nibble is a float of 1 sign, 2 exponent and 1 mantissa bits
//
// Byte 4 r + c of vector i of a q8 block is row r, input 4 i + c. A q4 byte holds that input of vector i in its
// low nibble and of vector i + 4 in its high one, a q2 byte those of vectors 4 i to 4 i + 3, a byte of third bits
// those of vectors 0 to 7. So a vector holds four inputs of each of 16 rows, and one instruction (VNNI)
// multiplies it with four bytes of the activation and adds up each row.
//
// After the codes of 16 rows and a group of 32, 64 or 128 inputs come float16 scale[16], and where codes are not
// symmetric float16 offset[16]:
//
//   none      w = scale * (q - 2^(bits - 1)), f4: w = scale * 2 * value
//   minimum   w = scale * q + offset
//   integer   w = scale * (q - offset)
//
// Float formats have their rows in order: f32, bf16, and e4m3 and e5m2 (8 bits, no NaN or infinity among them)
// with float32 scale [rows, columns / group] behind; their group divides the columns.
//
#pragma once

#include <string>

#include "common.hpp"

namespace actlas {

enum class Format { none = 0, f32 = 1, q8 = 2, q4 = 3, q3 = 4, q2 = 5, f4 = 6, bf16 = 7, e4m3 = 8, e5m2 = 9 };
enum class Offset { natural = 0, none = 1, minimum = 2, integer = 3 };  // natural: q8 and f4 none, else minimum

constexpr std::size_t kRows = 16, kGroup = 32, kQ4Block = 320, kQ8Block = 544, kMostTokens = 8;

struct Linear {
    Format format = Format::none;
    const void *data = nullptr;
    const float *bias = nullptr;
    std::size_t rows = 0, columns = 0, group = kGroup;
    Offset given = Offset::natural;

    std::size_t blocks() const { return (rows + kRows - 1) / kRows; }
    bool floats() const { return format == Format::f32 || format >= Format::bf16; }
    std::size_t bits() const {
        switch (format) {
            case Format::none: return 0;
            case Format::f32: return 32;
            case Format::bf16: return 16;
            case Format::q8: case Format::e4m3: case Format::e5m2: return 8;
            case Format::q4: case Format::f4: return 4;
            case Format::q3: return 3;
            case Format::q2: return 2;
        }
        return 0;
    }
    Offset offset() const {
        if (given != Offset::natural) return given;
        return format == Format::q8 || format == Format::f4 ? Offset::none : Offset::minimum;
    }
    // Bytes of 16 rows and one group of a packed format.
    std::size_t group_bytes() const { return 2 * bits() * group + (offset() == Offset::none ? 32 : 64); }
    std::size_t bytes() const {
        if (!floats()) return blocks() * (columns / group) * group_bytes();
        const std::size_t codes = rows * columns * bits() / 8;
        return bits() == 8 ? codes + 4 * rows * (columns / group) : codes;
    }
};

// What Python describes; throws std::invalid_argument where it does not fit.
Linear linear_of(const std::string &format, const void *data, std::size_t bytes, std::size_t rows,
                 std::size_t columns, std::size_t group, const std::string &offset);

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

// Its parts: float formats other than f32, and packed formats of any group and offset, in blocks of rows.
void apply_narrow_floats(const Linear &w, const Inputs &inputs, float *out, std::size_t stride, std::size_t begin,
                         std::size_t end, Level level);
void apply_groups(const Linear &w, const Inputs &inputs, float *out, std::size_t stride, std::size_t begin,
                  std::size_t end, Level level);

// Whether the byte kernels have their instructions here; without, a plain loop does the same sums.
bool has_vnni();

}  // namespace actlas
