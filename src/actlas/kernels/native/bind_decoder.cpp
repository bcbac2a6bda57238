// Python bindings of the decoder. Python keeps the tensors alive and checks what users pass.
#include <nanobind/stl/vector.h>

#include "bindings.hpp"
#include "columns.hpp"
#include "decoder.hpp"

namespace actlas {
namespace {

using namespace nb::literals;
using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MaybeVector = std::optional<Vector<float>>;

// A linear layer as Python describes it: format, data (bytes, or float32 rows), rows, columns, bias.
struct Given {
    Linear linear;
    Columns columns;
    const float *threshold = nullptr;

    Layer layer() const { return {linear, columns, threshold}; }
};

// Lets a layer skip inputs: its weight by columns too, and a threshold for each input.
void set_sparse(Given &w, const std::string &format, Bytes data, Vector<float> threshold, std::size_t group) {
    Columns c;
    c.format = column_format_named(format);
    c.group = c.packed() ? group : kGroup;
    require(c.group == 32 || c.group == 64 || c.group == 128, "group must be 32, 64 or 128");
    c.data = data.data();
    c.rows = w.linear.rows;
    c.columns = w.linear.columns;
    require(c.columns % c.group == 0, "layers that skip inputs have whole groups of columns");
    require(data.shape(0) == c.bytes(), "the data has not the size of its format");
    require(threshold.shape(0) == c.columns, "threshold must be [columns]");
    w.columns = c;
    w.threshold = threshold.data();
}

Given packed_linear(const std::string &format, Bytes data, std::size_t rows, std::size_t columns,
                    MaybeVector bias, std::size_t group, const std::string &offset) {
    Given out;
    Linear &w = out.linear;
    w = linear_of(format, data.data(), data.shape(0), rows, columns, group, offset);
    if (bias) {
        require(bias->shape(0) == rows, "bias must be [rows]");
        w.bias = bias->data();
    }
    return out;
}

Decoder *make_decoder(std::size_t d, std::size_t heads, std::size_t kv_heads, std::size_t head_dim,
                      std::size_t hidden, std::size_t length, double eps, double scale, int activation,
                      bool two_bytes, Table<float> cosines, Table<float> sines, int threads, const std::string &level) {
    require(d > 0 && heads > 0 && kv_heads > 0 && heads % kv_heads == 0 && hidden > 0 && length > 0, "sizes must fit");
    require(head_dim > 0 && head_dim % 2 == 0, "head_dim must be even");
    require(cosines.shape(0) >= length && cosines.shape(1) == head_dim / 2 && sines.shape(0) >= length &&
                sines.shape(1) == head_dim / 2,
            "cosines and sines must be [length, head_dim / 2]");
    require(activation >= 0 && activation <= 4, "no such activation");
    DecoderShape shape;
    shape.d = d;
    shape.heads = heads;
    shape.kv_heads = kv_heads;
    shape.head_dim = head_dim;
    shape.hidden = hidden;
    shape.length = length;
    shape.eps = static_cast<float>(eps);
    shape.attention_scale = static_cast<float>(scale);
    shape.two_bytes = two_bytes;
    shape.activation = static_cast<Activation>(activation);
    return new Decoder(shape, cosines.data(), sines.data(), threads, level_named(level));
}

void add_block(Decoder &decoder, const Given &q, const Given &k, const Given &v, const Given &o, const Given &gate,
               const Given &up, const Given &down, Vector<float> attention_norm, Vector<float> mlp_norm,
               MaybeVector q_norm, MaybeVector k_norm) {
    const DecoderShape &s = decoder.shape();
    const auto fits = [](const Given &w, std::size_t rows, std::size_t columns) {
        require(w.linear.rows == rows && w.linear.columns == columns, "a layer has not the decoder's sizes");
    };
    fits(q, s.heads * s.head_dim, s.d);
    fits(k, s.kv_heads * s.head_dim, s.d);
    fits(v, s.kv_heads * s.head_dim, s.d);
    fits(o, s.d, s.heads * s.head_dim);
    fits(gate, s.hidden, s.d);
    fits(up, s.hidden, s.d);
    fits(down, s.d, s.hidden);
    require(attention_norm.shape(0) == s.d && mlp_norm.shape(0) == s.d, "norms must be [d]");
    require((!q_norm || q_norm->shape(0) == s.head_dim) && (!k_norm || k_norm->shape(0) == s.head_dim),
            "head norms must be [head_dim]");
    decoder.add({q.layer(), k.layer(), v.layer(), o.layer(), gate.layer(), up.layer(), down.layer(),
                 attention_norm.data(), mlp_norm.data(), q_norm ? q_norm->data() : nullptr,
                 k_norm ? k_norm->data() : nullptr});
}

}  // namespace

void bind_decoder(nb::module_ &m) {
    m.attr("has_vnni") = nb::bool_(has_vnni());
    nb::class_<Given>(m, "PackedLinear")
        .def("set_sparse", &set_sparse, "format"_a, "data"_a, "threshold"_a, "group"_a = 32,
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
    m.def("packed_linear", &packed_linear, "format"_a, "data"_a, "rows"_a, "columns"_a, "bias"_a.none(),
          "group"_a, "offset"_a, nb::keep_alive<0, 2>(), nb::keep_alive<0, 5>());
    nb::class_<Decoder>(m, "Decoder")
        .def_static("make", &make_decoder, "d"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "hidden"_a, "length"_a,
                    "eps"_a, "scale"_a, "activation"_a, "two_bytes"_a, "cosines"_a, "sines"_a, "threads"_a, "level"_a,
                    nb::rv_policy::take_ownership, nb::keep_alive<0, 11>(), nb::keep_alive<0, 12>())
        .def("add", &add_block, "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a, "down"_a, "attention_norm"_a,
             "mlp_norm"_a, "q_norm"_a.none(), "k_norm"_a.none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(),
             nb::keep_alive<1, 8>(), nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>(), nb::keep_alive<1, 11>(),
             nb::keep_alive<1, 12>())
        .def("head",
             [](Decoder &decoder, const Given &w, Vector<float> norm) {
                 require(w.linear.columns == decoder.shape().d && norm.shape(0) == decoder.shape().d,
                         "the head must read d channels");
                 decoder.head(w.linear, norm.data());
             },
             "w"_a, "norm"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("run",
             [](Decoder &decoder, Table<float> x, std::size_t position, std::size_t begin, std::size_t end,
                bool skip) {
                 const DecoderShape &s = decoder.shape();
                 require(x.shape(1) == s.d && x.shape(0) >= 1 && x.shape(0) <= kMostTokens, "x must be [1 to 8, d]");
                 require(position + x.shape(0) <= s.length, "the cache is full");
                 require(begin <= end && end <= decoder.blocks(), "no such blocks");
                 nb::gil_scoped_release released;
                 decoder.run(x.data(), x.shape(0), position, begin, end, skip);
             },
             "x"_a, "position"_a, "begin"_a, "end"_a, "skip"_a)
        .def("logits",
             [](Decoder &decoder, Vector<float> x, Vector<float> out, std::size_t rows) {
                 require(x.shape(0) == decoder.shape().d && out.shape(0) == rows, "x must be [d], out [vocabulary]");
                 nb::gil_scoped_release released;
                 decoder.logits(x.data(), out.data());
             },
             "x"_a, "out"_a, "rows"_a)
        .def_prop_ro("inputs_read", &Decoder::inputs_read)
        .def_prop_ro("inputs_skipped", &Decoder::inputs_skipped)
        .def("cache",
             [](Decoder &decoder, std::size_t block, bool values) {
                 require(block < decoder.blocks(), "no such block");
                 const DecoderShape &s = decoder.shape();
                 return nb::ndarray<nb::numpy, float, nb::ndim<3>>(
                     values ? decoder.values(block) : decoder.keys(block), {s.kv_heads, s.length, s.head_dim},
                     nb::find(decoder));
             },
             "block"_a, "values"_a);
}

}  // namespace actlas
