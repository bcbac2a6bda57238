// Python bindings of products that are called one at a time. Python keeps the tensors alive.
#include "activation.hpp"
#include "bindings.hpp"
#include "columns.hpp"
#include "gated.hpp"
#include "lookup.hpp"
#include "selection.hpp"
#include "shared_team.hpp"

#include <cmath>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace actlas {
namespace {

using namespace nb::literals;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Columns columns_of(const std::string &format, const Bytes &data, std::size_t rows, std::size_t columns,
                   std::size_t group) {
    Columns w;
    w.format = column_format_named(format);
    w.data = data.data();
    w.rows = rows;
    w.columns = columns;
    w.group = w.packed() ? group : kGroup;
    require(rows > 0 && columns > 0, "a weight has rows and columns");
    require(w.group == 32 || w.group == 64 || w.group == 128, "group must be 32, 64 or 128");
    require(!w.packed() || columns % w.group == 0, "packed columns come in whole groups");
    require(data.shape(0) == w.bytes(), "the data has not the size of its format");
    return w;
}

// The integers of up to 8 tokens.
struct Room {
    std::vector<std::int8_t> high, low;
    std::vector<float> scale, sum;
    std::vector<std::int32_t> whole;

    Inputs inputs(const float *x, std::size_t tokens, std::size_t columns, bool two, bool packed, Level level) {
        const std::size_t n = packed ? tokens * columns : 0, groups = n / kGroup;
        high.resize(n);
        low.resize(n);
        scale.resize(groups);
        sum.resize(groups);
        whole.resize(groups);
        const Inputs in{x,      high.data(), two ? low.data() : nullptr, scale.data(), sum.data(), whole.data(),
                        tokens, columns};
        if (packed) quantise(in, level);
        return in;
    }
};

// out [tokens, rows] = the products of up to 8 tokens, read only where one of them is not zero.
void product_of(const Columns &w, const float *x, std::size_t tokens, float *out, bool two, int threads,
                Level level) {
    struct Scratch {  // kept between calls: to take and clear memory would cost as much as a small product
        Room room;
        std::vector<std::int32_t> active, starts;
        std::vector<std::vector<float>> sums;
    };
    static thread_local Scratch mine;
    Scratch &scratch = mine;
    Room &room = scratch.room;
    auto &active = scratch.active, &starts = scratch.starts;
    const Inputs in = room.inputs(x, tokens, w.columns, two, w.packed(), level);
    const std::size_t runs = (w.columns + kGroup - 1) / kGroup, padded = w.padded();
    active.resize(w.columns + 1);
    starts.resize(runs + 1);
    const std::size_t count = find_active(x, tokens, w.columns, active.data(), starts.data());
    constexpr std::size_t kSmall = 1 << 16;
    const std::size_t parts = count * w.rows * tokens < kSmall ? 1 : static_cast<std::size_t>(std::max(threads, 1));
    scratch.sums.resize(std::max(scratch.sums.size(), parts));
    run_together(parts, [&](std::size_t i) {
        std::vector<float> &mine = scratch.sums[i];
        mine.assign(tokens * padded, 0.0f);
        const std::int32_t *first = scratch.starts.data();
        add_columns(w, in, scratch.active.data(), first, share_of_active(first, runs, i, parts),
                    share_of_active(first, runs, i + 1, parts), mine.data(), level);
    });
    for (std::size_t t = 0; t < tokens; ++t) {
        float *to = out + t * w.rows;
        std::memcpy(to, scratch.sums[0].data() + t * padded, w.rows * sizeof(float));
        for (std::size_t i = 1; i < parts; ++i) {
            const float *part = scratch.sums[i].data() + t * padded;
            for (std::size_t r = 0; r < w.rows; ++r) to[r] += part[r];
        }
    }
}

void sparse_product(const std::string &format, Bytes data, std::size_t rows, std::size_t columns, std::size_t group,
                    Table<const float> x, Table<float> out, bool two_bytes, int threads, const std::string &level) {
    const Columns w = columns_of(format, data, rows, columns, group);
    require(x.shape(1) == columns && out.shape(1) == rows && x.shape(0) == out.shape(0),
            "x must be [tokens, columns] and out [tokens, rows]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    for (std::size_t t = 0; t < x.shape(0); t += kMostTokens) {
        product_of(w, x.data() + t * columns, std::min(kMostTokens, x.shape(0) - t), out.data() + t * rows, two_bytes,
                   threads, best);
    }
}

void rows_product(const std::string &format, Bytes data, std::size_t rows, std::size_t columns, std::size_t group,
                  const std::string &offset, std::optional<Vector<const float>> bias, Table<const float> x,
                  Table<float> out, bool two_bytes, int threads, const std::string &level) {
    Linear w = linear_of(format, data.data(), data.shape(0), rows, columns, group, offset);
    require(x.shape(1) == columns && out.shape(1) == rows && x.shape(0) == out.shape(0),
            "x must be [tokens, columns] and out [tokens, rows]");
    if (bias) {
        require(bias->shape(0) == rows, "bias must be [rows]");
        w.bias = bias->data();
    }
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    Room room;
    for (std::size_t t = 0; t < x.shape(0); t += kMostTokens) {
        const Inputs in = room.inputs(x.data() + t * columns, std::min(kMostTokens, x.shape(0) - t), columns,
                                      two_bytes, !w.floats(), best);
        share_out(w.blocks(), columns * kRows, threads, [&](std::size_t begin, std::size_t end) {
            apply_linear(w, in, out.data() + t * rows, rows, begin, end, best);
        });
    }
}

// y = W_down (f(W_gate x) * W_up x) over the neurons with |f(W_gate x)| >= threshold; returns how many they are.
std::size_t gated_product(const std::string &gate_format, Bytes gate_data, std::size_t gate_group, int up_format,
                          Bytes up_data, const std::string &down_format, Bytes down_data, std::size_t down_group,
                          Vector<const float> threshold, int activation, Vector<const float> x, Vector<float> out,
                          bool two_bytes, int threads, const std::string &level) {
    const std::size_t d = x.shape(0), hidden = threshold.shape(0);
    const Columns gate = columns_of(gate_format, gate_data, hidden, d, gate_group);
    const Columns down = columns_of(down_format, down_data, out.shape(0), hidden, down_group);
    require(up_format >= 0 && up_format <= 3 && activation >= 0 && activation <= 4, "no such format or activation");
    Gathered up;
    up.format = static_cast<RowFormat>(up_format);
    up.data = up_data.data();
    up.rows = hidden;
    up.columns = d;
    require(!up.packed() || d % kGroup == 0, "packed rows have a multiple of 32 columns");
    require(up_data.shape(0) == hidden * up.row_bytes(), "the data of up has not the size of its format");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    std::vector<float> factor(hidden), inner(hidden);
    product_of(gate, x.data(), 1, factor.data(), two_bytes, threads, best);
    std::vector<std::int32_t> active(hidden + 1);
    std::size_t count = 0;
    for (std::size_t j = 0; j < hidden; ++j) {
        factor[j] = activated(factor[j], static_cast<Activation>(activation));
        active[count] = static_cast<std::int32_t>(j);
        count += !(std::fabs(factor[j]) < threshold.data()[j]);  // NaN is active
    }
    Room room;
    const Inputs in = room.inputs(x.data(), 1, d, two_bytes, up.packed(), best);
    share_out(count, d, threads, [&](std::size_t begin, std::size_t end) {
        gather_rows(up, in, active.data() + begin, end - begin, factor.data(), inner.data(), best);
    });
    product_of(down, inner.data(), 1, out.data(), two_bytes, threads, best);
    return count;
}

// alpha and offset as bytes of float16 or float32.
void lookup_product(Bytes signs, Bytes alpha, std::optional<Bytes> offset, bool half, std::size_t rows,
                    std::size_t columns, std::size_t group, std::size_t bits, Table<const float> x, Table<float> out,
                    int threads, const std::string &level) {
    Binary w;
    w.signs = reinterpret_cast<const std::uint32_t *>(signs.data());
    w.alpha = alpha.data();
    w.offset = offset ? offset->data() : nullptr;
    w.half = half;
    w.rows = rows;
    w.columns = columns;
    w.group = group;
    w.bits = bits;
    require(rows > 0 && columns > 0 && bits > 0 && bits <= 8, "a binary-coded weight has rows, columns and 1 to 8 bits");
    require(group > 0 && group % 32 == 0 && columns % group == 0, "group must be a multiple of 32 that divides the columns");
    const std::size_t padded = 16 * w.blocks(), entries = columns / group * padded * (half ? 2 : 4);
    require(signs.shape(0) == columns / 32 * padded * bits * 4 && alpha.shape(0) == entries * bits &&
                (!offset || offset->shape(0) == entries),
            "the data has not the size of its format");
    require(x.shape(1) == columns && out.shape(1) == rows && x.shape(0) == out.shape(0),
            "x must be [tokens, columns] and out [tokens, rows]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    std::vector<float> y(padded);
    for (std::size_t t = 0; t < x.shape(0); ++t) {
        share_out(w.blocks(), columns * bits * 2, threads, [&](std::size_t begin, std::size_t end) {
            lookup(w, x.data() + t * columns, y.data(), begin, end, best);
        });
        std::copy(y.begin(), y.begin() + static_cast<std::ptrdiff_t>(rows), out.data() + t * rows);
    }
}

void select_topk(Table<const float> scores, std::size_t k, Table<std::uint8_t> mask, int threads,
                 const std::string &level) {
    require(scores.shape(0) == mask.shape(0) && scores.shape(1) == mask.shape(1), "mask must have the shape of scores");
    require(k > 0 && k <= scores.shape(1), "k must be from 1 to the number of scores of a row");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    topk_mask(scores.data(), scores.shape(0), scores.shape(1), k, mask.data(), threads, best);
}

template <std::size_t lanes> ACTLAS_INLINE void read_part(const std::uint8_t *from, std::size_t n, std::int32_t *sum) {
    using Ints = typename Vec<lanes>::Ints;
    constexpr std::size_t step = 8 * sizeof(Ints);
    Ints sums[8] = {}, v;
    for (std::size_t i = 0; i + step <= n; i += step) {
        for (std::size_t k = 0; k < 8; ++k) {
            load(v, from + i + k * sizeof(Ints));
            sums[k] ^= v;
        }
    }
    for (std::size_t k = 1; k < 8; ++k) sums[0] ^= sums[k];
    for (std::size_t l = 0; l < lanes; ++l) *sum ^= sums[0][l];
}
ACTLAS_FOR_LEVELS(read_part, (const std::uint8_t *from, std::size_t n, std::int32_t *sum), (from, n, sum))

int read_all(Bytes data, int threads) {
    nb::gil_scoped_release released;
    const std::size_t parts = static_cast<std::size_t>(std::max(threads, 1)), n = data.shape(0);
    std::vector<std::int32_t> sums(16 * parts);
    const auto read = read_part_for(best_level());
    run_together(parts, [&](std::size_t i) {
        read(data.data() + n * i / parts, n * (i + 1) / parts - n * i / parts, &sums[16 * i]);
    });
    std::int32_t total = 0;
    for (auto sum : sums) total ^= sum;
    return total;
}

// Asks for pages of 2 MB for the memory that a tensor fills wholly, at once where the system can (Linux 6.1).
bool use_large_pages(Bytes data) {
#ifdef __linux__
    constexpr std::uintptr_t size = std::uintptr_t{1} << 21;
    const auto first = reinterpret_cast<std::uintptr_t>(data.data());
    const std::uintptr_t begin = (first + size - 1) / size * size, end = (first + data.shape(0)) / size * size;
    if (begin >= end) return false;
    nb::gil_scoped_release released;
    void *where = reinterpret_cast<void *>(begin);  // NOLINT: an address within the tensor
    constexpr int huge = 14, collapse = 25;         // MADV_HUGEPAGE, MADV_COLLAPSE: older headers lack the latter
    return madvise(where, end - begin, huge) == 0 && madvise(where, end - begin, collapse) == 0;
#else
    (void)data;
    return false;
#endif
}

}  // namespace

void bind_products(nb::module_ &m) {
    m.def("sparse_product", &sparse_product, "format"_a, "data"_a, "rows"_a, "columns"_a, "group"_a, "x"_a, "out"_a,
          "two_bytes"_a, "threads"_a, "level"_a);
    m.def("rows_product", &rows_product, "format"_a, "data"_a, "rows"_a, "columns"_a, "group"_a, "offset"_a,
          "bias"_a.none(), "x"_a, "out"_a, "two_bytes"_a, "threads"_a, "level"_a);
    m.def("gated_product", &gated_product, "gate_format"_a, "gate_data"_a, "gate_group"_a, "up_format"_a, "up_data"_a,
          "down_format"_a, "down_data"_a, "down_group"_a, "threshold"_a, "activation"_a, "x"_a, "out"_a,
          "two_bytes"_a, "threads"_a, "level"_a);
    m.def("lookup_product", &lookup_product, "signs"_a, "alpha"_a, "offset"_a.none(), "half"_a, "rows"_a, "columns"_a,
          "group"_a, "bits"_a, "x"_a, "out"_a, "threads"_a, "level"_a);
    m.def("topk_mask", &select_topk, "scores"_a, "k"_a, "mask"_a, "threads"_a, "level"_a);
    m.def("use_large_pages", &use_large_pages, "data"_a);
    m.def("read_all", &read_all, "data"_a, "threads"_a,
          "Reads every byte once and returns a sum, to measure the memory's bandwidth.");
}

}  // namespace actlas
