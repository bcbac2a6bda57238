// Sparse codes: top k, decoder, gradients. See sparse_codes.py for what they compute and why.
#pragma once

#include "common.hpp"

namespace actlas {

// A float32 matrix whose rows are contiguous, `stride` floats apart.
struct Matrix {
    const float *data;
    std::size_t rows, columns, stride;
    const float *row(std::size_t i) const { return data + i * stride; }
};

// The k largest of each row of x, the largest first, of equal ones the first; NaN is the largest of all.
// T is float, or uint16_t for the bits of bfloat16.
template <class T>
void topk(const T *x, std::size_t n, std::size_t m, std::size_t stride, std::size_t k, bool relu, float *values,
          std::int64_t *indices, int threads, Level level);

// y_i = sum_j values_ij weight[indices_ij], rows of y contiguous.
void sparse_decode(const std::int64_t *indices, const float *values, std::size_t n, std::size_t k,
                   const Matrix &weight, float *y, int threads, Level level);

// g_ij = <rows_i, weight[indices_ij]>
void gather_dot(const std::int64_t *indices, std::size_t k, const Matrix &rows, const Matrix &weight, float *g,
                int threads, Level level);

// The codes of n rows sorted by latent: entries first[l] ... first[l + 1] - 1 belong to latent l, in the
// order of the rows. Entries of coefficient 0 are left out.
struct ByLatent {
    ByLatent(const std::int64_t *indices, const float *coefficients, std::size_t n, std::size_t k, std::size_t m);
    // The first latent of part i of `parts` of about equal work, if a latent's row costs as much as
    // `per_latent` entries.
    std::size_t part(std::size_t i, std::size_t parts, std::size_t per_latent) const;
    std::vector<std::uint32_t> first;
    std::vector<std::int64_t> row;
    std::vector<float> coefficient;
};

// G[l] = (add ? G[l] : 0) + sum of coefficient * rows_i over the entries of latent l.
void scatter_outer(const ByLatent &entries, const Matrix &rows, std::size_t m, float *gradient, bool add,
                   int threads, Level level);

// sum_j coefficients_j matrix[index_j] into out, over all channels: the loop of both directions.
template <std::size_t lanes, std::size_t vectors>
ACTLAS_INLINE void weighted_sum_part(const Matrix &from, const std::int64_t *index, const float *coefficients,
                                     std::size_t count, float *out, std::size_t at, bool add) {
    typename Vec<lanes>::Floats sum[vectors], x;
    for (std::size_t v = 0; v < vectors; ++v) {
        sum[v] = typename Vec<lanes>::Floats{};
        if (add) load(sum[v], out + at + v * lanes);
    }
    for (std::size_t j = 0; j < count; ++j) {
        const float *row = from.row(index[j]) + at;
        const float c = coefficients[j];
        for (std::size_t v = 0; v < vectors; ++v) {
            load(x, row + v * lanes);
            sum[v] += x * c;
        }
    }
    for (std::size_t v = 0; v < vectors; ++v) store(out + at + v * lanes, sum[v]);
}

template <std::size_t lanes>
ACTLAS_INLINE void weighted_sum(const Matrix &from, const std::int64_t *index, const float *coefficients,
                                std::size_t count, float *out, bool add) {
    std::size_t at = 0;
    const std::size_t d = from.columns;
    for (; at + 12 * lanes <= d; at += 12 * lanes)
        weighted_sum_part<lanes, 12>(from, index, coefficients, count, out, at, add);
    for (; at + 4 * lanes <= d; at += 4 * lanes)
        weighted_sum_part<lanes, 4>(from, index, coefficients, count, out, at, add);
    for (; at + lanes <= d; at += lanes)
        weighted_sum_part<lanes, 1>(from, index, coefficients, count, out, at, add);
    for (; at < d; ++at) {
        float sum = add ? out[at] : 0.0f;
        for (std::size_t j = 0; j < count; ++j) sum += coefficients[j] * from.row(index[j])[at];
        out[at] = sum;
    }
}

}  // namespace actlas
