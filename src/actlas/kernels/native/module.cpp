// Python bindings of the native kernels: actlas.kernels._native.
#include "bindings.hpp"
#include "statistics.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using actlas::Vector;

namespace {

using Rows = actlas::Table<const float>;

const char *const kLevelNames[] = {"baseline", "avx2", "avx512"};

double *data_of(const std::optional<Vector<double>> &vector, std::size_t d) {
    if (!vector) return nullptr;
    if (vector->shape(0) != d)
        throw std::invalid_argument("expected " + std::to_string(d) + " channels, got " +
                                    std::to_string(vector->shape(0)));
    return vector->data();
}

void accumulate(Rows rows, Vector<double> sums, Vector<double> squares, Vector<double> absmax,
                std::optional<Vector<double>> thirds, std::optional<Vector<double>> fourths, int threads,
                const std::string &level) {
    const std::size_t n = rows.shape(0), d = rows.shape(1);
    const actlas::Moments moments{data_of(sums, d), data_of(squares, d), data_of(absmax, d),
                                  data_of(thirds, d), data_of(fourths, d)};
    const actlas::Level wanted = actlas::level_named(level);
    nb::gil_scoped_release released;
    actlas::accumulate(rows.data(), n, d, moments, threads, wanted);
}

void add(const actlas::LogBuckets &buckets, Vector<const float> values, Vector<std::int64_t> counts, int threads) {
    if (counts.shape(0) != 2 * buckets.half() + 1)
        throw std::invalid_argument("counts must have " + std::to_string(2 * buckets.half() + 1) + " entries, not " +
                                    std::to_string(counts.shape(0)));
    nb::gil_scoped_release released;
    buckets.add(values.data(), values.shape(0), counts.data(), threads);
}

}  // namespace

actlas::Level actlas::level_named(const std::string &name) {
    if (name == "best") return best_level();
    for (int i = 0; i < 3; ++i)
        if (name == kLevelNames[i]) return static_cast<Level>(i);
    throw std::invalid_argument("level must be baseline, avx2, avx512 or best, not " + name);
}

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);  // buckets live in a cache until the process ends
    m.doc() = "Native kernels of Actlas; use them through the Python files of actlas.kernels.";
    m.def("accumulate", &accumulate, "rows"_a, "sums"_a, "squares"_a, "absmax"_a, "thirds"_a.none(),
          "fourths"_a.none(), "threads"_a = 1, "level"_a = "best",
          "Add contiguous float32 rows [n, d] to float64 per-channel moments, in place.");
    m.def("best_level", [] { return kLevelNames[static_cast<int>(actlas::best_level())]; },
          "The instruction set that is used on this processor.");
    nb::class_<actlas::LogBuckets>(m, "LogBuckets")
        .def("__init__",
             [](actlas::LogBuckets *self, Vector<const float> edges) {
                 if (edges.shape(0) < 2) throw std::invalid_argument("edges must have at least 2 entries");
                 new (self) actlas::LogBuckets(edges.data(), edges.shape(0));
             },
             "edges"_a, "Buckets with increasing upper edges, float32 [B + 1].")
        .def("add", &add, "values"_a, "counts"_a, "threads"_a = 1,
             "Count float32 values into int64 counts [2B + 1], in place.");
    actlas::bind_sparse_codes(m);
    actlas::bind_decoder(m);
    actlas::bind_products(m);
}
