// What the bindings of all kernels share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "common.hpp"

namespace actlas {

namespace nb = nanobind;

template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T> using Table = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T> using Strided = nb::ndarray<T, nb::ndim<2>, nb::device::cpu>;

// "baseline", "avx2", "avx512", or "best" for what this processor has.
Level level_named(const std::string &name);

// Raises ValueError in Python.
inline void require(bool fits, const char *what) {
    if (!fits) throw std::invalid_argument(what);
}

void bind_sparse_codes(nb::module_ &m);
void bind_decoder(nb::module_ &m);
void bind_products(nb::module_ &m);

}  // namespace actlas
