// A gated MLP for one token that reads only what active neurons need.
//
//   a = f(W_gate x),   h_j = a_j (U_j . x) where |a_j| >= threshold_j, else 0,   y = W_down h
//
// Of up, only the rows of active neurons are read; of down, only their columns. U may be f32 or bf16, or packed
// by rows: for each row, groups of 32 inputs as
//
//   r8   32 bytes q, float16 scale                          w = scale * (q - 128)
//   r4   16 bytes, float16 scale, float16 minimum           w = scale * q + minimum; low nibbles first, then high
//
// which are the blocks of GGUF's Q8_0 and Q4_1 with the scale behind and q8 without a sign.
#pragma once

#include "columns.hpp"

namespace actlas {

enum class RowFormat { f32 = 0, bf16 = 1, r8 = 2, r4 = 3 };

struct Gathered {
    RowFormat format = RowFormat::f32;
    const std::uint8_t *data = nullptr;
    std::size_t rows = 0, columns = 0;

    bool packed() const { return format == RowFormat::r8 || format == RowFormat::r4; }
    std::size_t row_bytes() const {
        switch (format) {
            case RowFormat::f32: return 4 * columns;
            case RowFormat::bf16: return 2 * columns;
            case RowFormat::r8: return columns / kGroup * 34;
            case RowFormat::r4: return columns / kGroup * 20;
        }
        return 0;
    }
};

// out[active[i]] = the product of that row with x, times factor[active[i]]; other entries stay.
void gather_rows(const Gathered &w, const Inputs &in, const std::int32_t *active, std::size_t count,
                 const float *factor, float *out, Level level);

}  // namespace actlas
