// Python bindings of the kernels on sparse codes. The Python files check what users pass, indices too.
#include "bindings.hpp"
#include "gather.hpp"
#include "pursuit.hpp"
#include "row_steps.hpp"
#include "sparse_codes.hpp"

namespace actlas {
namespace {

using namespace nb::literals;
using Indices = Table<const std::int64_t>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The strides of an empty array, and of an axis of length 1, mean nothing.
template <class Array> void require_rows(const Array &array, const char *what) {
    require(array.size() == 0 || ((array.stride(1) == 1 || array.shape(1) == 1) &&
                                  (array.stride(0) >= 0 || array.shape(0) == 1)),
            what);
}

Matrix matrix(const Strided<const float> &array) {
    require_rows(array, "the rows of a matrix must be contiguous and in order");
    return {array.data(), array.shape(0), array.shape(1), static_cast<std::size_t>(array.stride(0))};
}

template <class T, class U> void require_same(const T &a, const U &b, const char *what) {
    require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), what);
}

template <class T>
void bind_topk(Strided<const T> x, bool relu, Table<float> values, Table<std::int64_t> indices, int threads,
               const std::string &level) {
    require_same(values, indices, "values and indices must be [n, k]");
    const std::size_t n = x.shape(0), m = x.shape(1), k = values.shape(1);
    require(values.shape(0) == n && k >= 1 && k <= m && m < (std::size_t{1} << 31), "values must be [n, k], k <= m");
    require_rows(x, "the rows of x must be contiguous and in order");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    topk(x.data(), n, m, static_cast<std::size_t>(x.stride(0)), k, relu, values.data(), indices.data(), threads,
         best);
}

void bind_decode(Indices indices, Table<const float> values, Strided<const float> weight, Table<float> out,
                 int threads, const std::string &level) {
    require_same(indices, values, "indices and values must be [n, k]");
    require(out.shape(0) == indices.shape(0) && out.shape(1) == weight.shape(1), "out must be [n, d]");
    const Matrix w = matrix(weight);
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    sparse_decode(indices.data(), values.data(), indices.shape(0), indices.shape(1), w, out.data(), threads, best);
}

void bind_dot(Indices indices, Strided<const float> rows, Strided<const float> weight, Table<float> out, int threads,
              const std::string &level) {
    require_same(indices, out, "indices and out must be [n, k]");
    require(rows.shape(0) == indices.shape(0) && rows.shape(1) == weight.shape(1), "rows must be [n, d]");
    const Matrix r = matrix(rows), w = matrix(weight);
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    gather_dot(indices.data(), indices.shape(1), r, w, out.data(), threads, best);
}

ByLatent by_latent(const Indices &indices, const Table<const float> &coefficients, const Matrix &rows,
                   std::size_t m) {
    require_same(indices, coefficients, "indices and coefficients must be [n, k]");
    require(rows.rows == indices.shape(0), "rows must be [n, d]");
    require(indices.size() < (std::size_t{1} << 32), "too many entries; use smaller batches");
    return ByLatent(indices.data(), coefficients.data(), indices.shape(0), indices.shape(1), m);
}

void bind_outer(Indices indices, Table<const float> coefficients, Strided<const float> rows, Table<float> out,
                bool add, int threads, const std::string &level) {
    const Matrix r = matrix(rows);
    require(out.shape(1) == r.columns, "out must be [m, d]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    scatter_outer(by_latent(indices, coefficients, r, out.shape(0)), r, out.shape(0), out.data(), add, threads, best);
}

Adam adam(double rate, double correction, double beta1, double beta2, double eps, double scale) {
    return {static_cast<float>(beta1), static_cast<float>(beta2),      static_cast<float>(eps),
            static_cast<float>(rate),  static_cast<float>(correction), static_cast<float>(scale)};
}

void bind_adam(Table<float> w, Table<const float> g, Table<float> m, Table<float> v, std::optional<Bytes> touched,
               bool lazy, double rate, double correction, double beta1, double beta2, double eps, double scale,
               int threads, const std::string &level) {
    require_same(w, g, "gradient must have the shape of the parameter");
    require_same(w, m, "m must have the shape of the parameter");
    require_same(w, v, "v must have the shape of the parameter");
    require(!touched || touched->shape(0) == w.shape(0), "touched must be [rows]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    adam_rows(w.data(), g.data(), m.data(), v.data(), w.shape(0), w.shape(1), touched ? touched->data() : nullptr,
              lazy, adam(rate, correction, beta1, beta2, eps, scale), threads, best);
}

// The matrix whose rows are added to the gradients of some latents, and where each latent's row is.
struct Extra {
    Extra(const std::optional<Vector<const std::int64_t>> &latents,
          const std::optional<Strided<const float>> &gradient, std::size_t m, std::size_t d) {
        require(latents.has_value() == gradient.has_value(), "extra needs latents and their gradient");
        if (!latents) return;
        rows = matrix(*gradient);
        require(rows.rows == latents->shape(0) && rows.columns == d, "the extra gradient must be [latents, d]");
        place.assign(m, -1);
        for (std::size_t i = 0; i < rows.rows; ++i) {
            const std::int64_t latent = latents->data()[i];
            require(latent >= 0 && latent < static_cast<std::int64_t>(m), "an extra latent is out of range");
            place[static_cast<std::size_t>(latent)] = static_cast<std::int32_t>(i);
        }
    }
    Matrix rows{};
    std::vector<std::int32_t> place;
};

void bind_fused(Table<float> w, Table<float> m, Table<float> v, Indices indices, Table<const float> coefficients,
                Strided<const float> rows, std::optional<Vector<const std::int64_t>> latents,
                std::optional<Strided<const float>> gradient, bool lazy, bool remove_parallel, bool renormalise,
                double rate, double correction, double beta1, double beta2, double eps, double scale, int threads,
                const std::string &level) {
    require_same(w, m, "m must have the shape of the parameter");
    require_same(w, v, "v must have the shape of the parameter");
    const Matrix r = matrix(rows);
    require(w.shape(1) == r.columns, "rows must be [n, d]");
    const Extra extra(latents, gradient, w.shape(0), r.columns);
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    const ByLatent entries = by_latent(indices, coefficients, r, w.shape(0));
    fused_row_step(w.data(), m.data(), v.data(), {entries, r, extra.rows, extra.place},
                   {lazy, remove_parallel, renormalise}, adam(rate, correction, beta1, beta2, eps, scale), threads,
                   best);
}

double bind_norm(Table<const float> w, Indices indices, Table<const float> coefficients, Strided<const float> rows,
                 std::optional<Vector<const std::int64_t>> latents, std::optional<Strided<const float>> gradient,
                 bool remove_parallel, int threads, const std::string &level) {
    const Matrix r = matrix(rows);
    require(w.shape(1) == r.columns, "rows must be [n, d]");
    const Extra extra(latents, gradient, w.shape(0), r.columns);
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    const ByLatent entries = by_latent(indices, coefficients, r, w.shape(0));
    return fused_square_norm(w.data(), {entries, r, extra.rows, extra.place}, remove_parallel, threads, best);
}

void bind_pursue(Table<float> correlations, Strided<const float> gram, Table<std::int64_t> picks, Table<float> steps,
                 int threads, const std::string &level) {
    require_same(picks, steps, "picks and steps must be [n, k]");
    const Matrix g = matrix(gram);
    require(g.rows == g.columns && g.columns == correlations.shape(1) && picks.shape(0) == correlations.shape(0) &&
                g.columns < (std::size_t{1} << 31),
            "correlations must be [n, m] and gram [m, m]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    pursue(correlations.data(), correlations.shape(0), picks.shape(1), g, picks.data(), steps.data(), threads, best);
}

void bind_gather(nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu> source, const std::string &number,
                 std::optional<nb::ndarray<nb::ro, const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>> scales,
                 Vector<const std::int64_t> indices, Table<float> out, int threads, const std::string &level) {
    const char *const names[] = {"float32", "float16", "bfloat16", "int8"};
    const std::size_t sizes[] = {4, 2, 2, 1};
    std::size_t kind = 0;
    while (kind < 4 && number != names[kind]) ++kind;
    require(kind < 4 && source.itemsize() == sizes[kind], "the source does not hold numbers of this kind");
    require_rows(source, "the rows of the source must be contiguous and in order");
    require(out.shape(0) == indices.shape(0) && out.shape(1) == source.shape(1), "out must be [rows, d]");
    require(!scales || scales->shape(0) == source.shape(0), "scales must be [n]");
    const Level best = level_named(level);
    nb::gil_scoped_release released;
    gather_rows(source.data(), static_cast<Number>(kind), source.shape(1), static_cast<std::size_t>(source.stride(0)),
                scales ? scales->data() : nullptr, indices.data(), indices.shape(0), out.data(), threads, best);
}

}  // namespace

void bind_sparse_codes(nb::module_ &m) {
    m.def("topk", &bind_topk<float>, "x"_a, "relu"_a, "values"_a, "indices"_a, "threads"_a = 1, "level"_a = "best");
    m.def("topk_bfloat16", &bind_topk<std::uint16_t>, "x"_a, "relu"_a, "values"_a, "indices"_a, "threads"_a = 1,
          "level"_a = "best");
    m.def("sparse_decode", &bind_decode, "indices"_a, "values"_a, "weight"_a, "out"_a, "threads"_a = 1,
          "level"_a = "best");
    m.def("gather_dot", &bind_dot, "indices"_a, "rows"_a, "weight"_a, "out"_a, "threads"_a = 1, "level"_a = "best");
    m.def("scatter_outer", &bind_outer, "indices"_a, "coefficients"_a, "rows"_a, "out"_a, "add"_a, "threads"_a = 1,
          "level"_a = "best");
    m.def("adam_rows", &bind_adam, "w"_a, "g"_a, "m"_a, "v"_a, "touched"_a.none(), "lazy"_a, "rate"_a,
          "correction"_a, "beta1"_a, "beta2"_a, "eps"_a, "scale"_a, "threads"_a = 1, "level"_a = "best");
    m.def("fused_row_step", &bind_fused, "w"_a, "m"_a, "v"_a, "indices"_a, "coefficients"_a, "rows"_a,
          "latents"_a.none(), "gradient"_a.none(), "lazy"_a, "remove_parallel"_a, "renormalise"_a, "rate"_a, "correction"_a, "beta1"_a, "beta2"_a, "eps"_a, "scale"_a,
          "threads"_a = 1, "level"_a = "best");
    m.def("fused_square_norm", &bind_norm, "w"_a, "indices"_a, "coefficients"_a, "rows"_a,
          "latents"_a.none(), "gradient"_a.none(), "remove_parallel"_a, "threads"_a = 1, "level"_a = "best");
    m.def("pursue", &bind_pursue, "correlations"_a, "gram"_a, "picks"_a, "steps"_a, "threads"_a = 1,
          "level"_a = "best");
    m.def("gather_rows", &bind_gather, "source"_a, "number"_a, "scales"_a.none(), "indices"_a, "out"_a,
          "threads"_a = 1, "level"_a = "best");
}

}  // namespace actlas
