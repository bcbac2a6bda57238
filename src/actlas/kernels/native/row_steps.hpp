// Optimizer steps on the rows of a matrix. See row_steps.py.
#pragma once

#include "sparse_codes.hpp"

namespace actlas {

struct Adam {
    float beta1, beta2, eps;
    float rate;        // lr / (1 - beta1^t)
    float correction;  // 1 / sqrt(1 - beta2^t)
    float scale;       // factor on the gradient
};

// One step for rows [rows, d] of w with gradient g and moments m, v, all contiguous. Where `touched` is not
// null and 0 the gradient is zero and not read; `lazy` leaves such rows as they are.
void adam_rows(float *w, const float *g, float *m, float *v, std::size_t rows, std::size_t d,
               const std::uint8_t *touched, bool lazy, const Adam &adam, int threads, Level level);

struct RowOptions {
    bool lazy;             // leave latents without a gradient as they are
    bool remove_parallel;  // take the part along the row out of its gradient
    bool renormalise;      // scale the row to unit norm afterwards
};

// Where the gradient of each latent's row comes from: the entries of the codes times the rows, plus, for
// some latents, a row of `extra` (place[l] >= 0; `place` may be empty).
struct RowGradients {
    const ByLatent &entries;
    Matrix rows, extra;
    std::vector<std::int32_t> place;
    bool touched(std::size_t l) const {
        return entries.first[l + 1] > entries.first[l] || (!place.empty() && place[l] >= 0);
    }
};

// The gradient of each latent's row, then its step, while the row is in cache.
void fused_row_step(float *w, float *m, float *v, const RowGradients &gradients, const RowOptions &options,
                    const Adam &adam, int threads, Level level);

// The sum of squares of the gradient that fused_row_step would use, in float64.
double fused_square_norm(const float *w, const RowGradients &gradients, bool remove_parallel, int threads,
                         Level level);

}  // namespace actlas
