#include "selection.hpp"

namespace actlas {
namespace {

// Scores become integers of the same order. The k-th largest of them is found bit by bit from the top: with a
// bit set, are there still k integers as large? Each question is one pass over a row that lies in the first
// cache, with as many comparisons at once as there are lanes.
template <std::size_t lanes>
ACTLAS_INLINE void mask_row(const float *scores, std::size_t d, std::size_t k, std::uint8_t *mask,
                            std::int32_t *keys) {
    using Ints = typename Vec<lanes>::Ints;
    const std::size_t whole = (d + lanes - 1) / lanes * lanes;
    for (std::size_t i = 0; i < whole; i += lanes) {
        Ints bits;
        if (i + lanes <= d) {
            load(bits, scores + i);
        } else {
            std::int32_t tail[lanes];
            for (std::size_t l = 0; l < lanes; ++l) tail[l] = -1;
            std::memcpy(tail, scores + i, (d - i) * sizeof(float));
            load(bits, tail);
        }
        const Ints size = bits & 0x7fffffff;
        Ints key = bits < 0 ? -size : bits;          // -0 becomes 0
        key = size > 0x7f800000 ? Ints{} + 0x7fffffff : key;  // NaN
        store(keys + i, key);
    }
    // Entries behind the row are below every key.
    for (std::size_t i = d; i < whole; ++i) keys[i] = INT32_MIN;
    const auto count = [&](std::int32_t least) {
        Ints total = {}, key;
        for (std::size_t i = 0; i < whole; i += lanes) {
            load(key, keys + i);
            total -= key >= least;
        }
        std::size_t found = 0;
        for (std::size_t l = 0; l < lanes; ++l) found += static_cast<std::size_t>(total[l]);
        return found;
    };
    const auto wanted = k;
    std::int32_t edge = count(0) >= wanted ? 0 : INT32_MIN;
    for (int bit = 30; bit >= 0; --bit) {
        const std::int32_t next = edge + (std::int32_t{1} << bit);
        if (count(next) >= wanted) edge = next;
    }
    // edge is the k-th largest key: all above it are taken, and the first of those equal to it.
    std::size_t left = wanted - (edge == INT32_MAX ? 0 : count(edge + 1));
    for (std::size_t i = 0; i < d; ++i) {
        const bool equal = keys[i] == edge;
        const bool taken = keys[i] > edge || (equal && left > 0);
        left -= equal && left > 0;
        mask[i] = taken;
    }
}

template <std::size_t lanes>
ACTLAS_INLINE void mask_rows(const float *scores, std::size_t n, std::size_t d, std::size_t k, std::uint8_t *mask) {
    std::vector<std::int32_t> keys(d + 16);
    for (std::size_t row = 0; row < n; ++row) {
        mask_row<lanes>(scores + row * d, d, k, mask + row * d, keys.data());
    }
}
ACTLAS_FOR_LEVELS(mask_rows,
                  (const float *scores, std::size_t n, std::size_t d, std::size_t k, std::uint8_t *mask),
                  (scores, n, d, k, mask))

}  // namespace

void topk_mask(const float *scores, std::size_t n, std::size_t d, std::size_t k, std::uint8_t *mask, int threads,
               Level level) {
    const auto run = mask_rows_for(level);
    split(n, 8 * d, threads, [&](std::size_t begin, std::size_t end) {
        run(scores + begin * d, end - begin, d, k, mask + begin * d);
    });
}

}  // namespace actlas
