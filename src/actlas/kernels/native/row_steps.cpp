#include "row_steps.hpp"

#include <cmath>

namespace actlas {
namespace {

// A plain loop, which the compiler turns into vectors of each instruction set by itself.
template <bool has_gradient>
ACTLAS_INLINE void adam_loop(float *__restrict w, const float *__restrict g, float *__restrict m,
                             float *__restrict v, std::size_t count, const Adam &adam) {
    const float keep1 = adam.beta1, keep2 = adam.beta2, take1 = 1.0f - keep1, take2 = 1.0f - keep2;
    const float rate = adam.rate, correction = adam.correction, eps = adam.eps, scale = adam.scale;
    for (std::size_t i = 0; i < count; ++i) {
        const float x = has_gradient ? g[i] * scale : 0.0f;
        const float first = has_gradient ? m[i] * keep1 + x * take1 : m[i] * keep1;
        const float second = has_gradient ? v[i] * keep2 + x * x * take2 : v[i] * keep2;
        m[i] = first;
        v[i] = second;
        w[i] -= rate * first / (__builtin_sqrtf(second) * correction + eps);
    }
}

// `count` elements; g null: the gradient is zero.
ACTLAS_INLINE void adam_span(float *w, const float *g, float *m, float *v, std::size_t count, const Adam &adam) {
    if (g)
        adam_loop<true>(w, g, m, v, count, adam);
    else
        adam_loop<false>(w, g, m, v, count, adam);
}

template <std::size_t lanes>
ACTLAS_INLINE void adam_block(float *w, const float *g, float *m, float *v, std::size_t begin, std::size_t end,
                              std::size_t d, const std::uint8_t *touched, bool lazy, const Adam &adam) {
    if (!touched) {
        adam_span(w + begin * d, g + begin * d, m + begin * d, v + begin * d, (end - begin) * d, adam);
        return;
    }
    for (std::size_t r = begin; r < end; ++r) {
        if (lazy && !touched[r]) continue;
        adam_span(w + r * d, touched[r] ? g + r * d : nullptr, m + r * d, v + r * d, d, adam);
    }
}
ACTLAS_FOR_LEVELS(adam_block,
                  (float *w, const float *g, float *m, float *v, std::size_t begin, std::size_t end, std::size_t d,
                   const std::uint8_t *touched, bool lazy, const Adam &adam),
                  (w, g, m, v, begin, end, d, touched, lazy, adam))

template <std::size_t lanes> ACTLAS_INLINE float dot(const float *a, const float *b, std::size_t d) {
    using Floats = typename Vec<lanes>::Floats;
    Floats sum{}, more{}, x, y;
    std::size_t c = 0;
    for (; c + 2 * lanes <= d; c += 2 * lanes) {
        load(x, a + c);
        load(y, b + c);
        sum += x * y;
        load(x, a + c + lanes);
        load(y, b + c + lanes);
        more += x * y;
    }
    sum += more;
    float total = 0.0f;
    for (std::size_t v = 0; v < lanes; ++v) total += sum[v];
    for (; c < d; ++c) total += a[c] * b[c];
    return total;
}

// The gradient of latent l into g; its length is that of a row.
template <std::size_t lanes>
ACTLAS_INLINE void row_gradient(const float *w, const RowGradients &from, std::size_t l, bool remove_parallel,
                                float *g) {
    const ByLatent &entries = from.entries;
    const std::size_t d = from.rows.columns;
    const std::uint32_t first = entries.first[l], count = entries.first[l + 1] - first;
    weighted_sum<lanes>(from.rows, entries.row.data() + first, entries.coefficient.data() + first, count, g, false);
    if (!from.place.empty() && from.place[l] >= 0) {
        const float *more = from.extra.row(static_cast<std::size_t>(from.place[l]));
        for (std::size_t c = 0; c < d; ++c) g[c] += more[c];
    }
    if (remove_parallel) {
        const float along = dot<lanes>(g, w, d), square = dot<lanes>(w, w, d);
        const float part = square > 0.0f ? along / square : 0.0f;
        for (std::size_t c = 0; c < d; ++c) g[c] -= part * w[c];
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void fused_block(float *w, float *m, float *v, const RowGradients &from, std::size_t begin,
                               std::size_t end, const RowOptions &options, const Adam &adam, float *g) {
    const std::size_t d = from.rows.columns;
    for (std::size_t l = begin; l < end; ++l) {
        const bool touched = from.touched(l);
        float *row = w + l * d;
        if (touched)
            row_gradient<lanes>(row, from, l, options.remove_parallel, g);
        else if (options.lazy)
            continue;
        adam_span(row, touched ? g : nullptr, m + l * d, v + l * d, d, adam);
        if (options.renormalise) {
            const float square = dot<lanes>(row, row, d);
            const float factor = square > 0.0f ? 1.0f / __builtin_sqrtf(square) : 1.0f;
            for (std::size_t c = 0; c < d; ++c) row[c] *= factor;
        }
    }
}
ACTLAS_FOR_LEVELS(fused_block,
                  (float *w, float *m, float *v, const RowGradients &from, std::size_t begin, std::size_t end,
                   const RowOptions &options, const Adam &adam, float *g),
                  (w, m, v, from, begin, end, options, adam, g))

template <std::size_t lanes>
ACTLAS_INLINE void norms_block(const float *w, const RowGradients &from, std::size_t begin, std::size_t end,
                               bool remove_parallel, float *g, double *squares) {
    const std::size_t d = from.rows.columns;
    for (std::size_t l = begin; l < end; ++l) {
        squares[l] = 0.0;
        if (!from.touched(l)) continue;
        row_gradient<lanes>(w + l * d, from, l, remove_parallel, g);
        squares[l] = dot<lanes>(g, g, d);
    }
}
ACTLAS_FOR_LEVELS(norms_block,
                  (const float *w, const RowGradients &from, std::size_t begin, std::size_t end,
                   bool remove_parallel, float *g, double *squares),
                  (w, from, begin, end, remove_parallel, g, squares))

template <class Work>
void split_latents(const ByLatent &entries, std::size_t d, std::size_t per_latent, int threads, const Work &work) {
    const std::size_t m = entries.first.size() - 1;
    const bool small = (entries.row.size() + m) * d < (1 << 18);
    const std::size_t parts = small ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    run_parts(parts, [&](std::size_t i) {
        std::vector<float> g(d);
        work(entries.part(i, parts, per_latent), entries.part(i + 1, parts, per_latent), g.data());
    });
}

}  // namespace

void adam_rows(float *w, const float *g, float *m, float *v, std::size_t rows, std::size_t d,
               const std::uint8_t *touched, bool lazy, const Adam &adam, int threads, Level level) {
    const auto loop = adam_block_for(level);
    split(rows, 4 * d, threads, [&](std::size_t begin, std::size_t end) {
        loop(w, g, m, v, begin, end, d, touched, lazy, adam);
    });
}

void fused_row_step(float *w, float *m, float *v, const RowGradients &gradients, const RowOptions &options,
                    const Adam &adam, int threads, Level level) {
    const auto loop = fused_block_for(level);
    split_latents(gradients.entries, gradients.rows.columns, 12, threads,
                  [&](std::size_t begin, std::size_t end, float *g) {
                      loop(w, m, v, gradients, begin, end, options, adam, g);
                  });
}

double fused_square_norm(const float *w, const RowGradients &gradients, bool remove_parallel, int threads,
                         Level level) {
    const auto loop = norms_block_for(level);
    std::vector<double> squares(gradients.entries.first.size() - 1);
    split_latents(gradients.entries, gradients.rows.columns, 1, threads,
                  [&](std::size_t begin, std::size_t end, float *g) {
                      loop(w, gradients, begin, end, remove_parallel, g, squares.data());
                  });
    double total = 0.0;
    for (const double square : squares) total += square;
    return total;
}

}  // namespace actlas
