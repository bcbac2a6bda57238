#include "decoder.hpp"

#include <cmath>

namespace actlas {
namespace {

void rms_norm(const float *x, const float *gain, float *out, std::size_t d, float eps) {
    float squares = 0.0f;
    float parts[16] = {};
    std::size_t i = 0;
    for (; i + 16 <= d; i += 16) {
        for (std::size_t l = 0; l < 16; ++l) parts[l] += x[i + l] * x[i + l];
    }
    for (; i < d; ++i) squares += x[i] * x[i];
    for (float part : parts) squares += part;
    const float factor = 1.0f / std::sqrt(squares / static_cast<float>(d) + eps);
    for (i = 0; i < d; ++i) out[i] = gain[i] * (x[i] * factor);
}

template <std::size_t lanes> ACTLAS_INLINE float dot(const float *a, const float *b, std::size_t d) {
    using Floats = typename Vec<lanes>::Floats;
    Floats sum{}, x, y;
    std::size_t i = 0;
    for (; i + lanes <= d; i += lanes) {
        load(x, a + i);
        load(y, b + i);
        sum += x * y;
    }
    float total = 0.0f;
    for (std::size_t l = 0; l < lanes; ++l) total += sum[l];
    for (; i < d; ++i) total += a[i] * b[i];
    return total;
}

// One head: softmax(q K^T scale) V over `count` cached positions.
template <std::size_t lanes>
ACTLAS_INLINE void one_head(const float *q, const float *keys, const float *values, float *scores, float *out,
                            std::size_t count, std::size_t d, float scale) {
    using Floats = typename Vec<lanes>::Floats;
    float largest = -INFINITY;
    for (std::size_t p = 0; p < count; ++p) {
        scores[p] = dot<lanes>(q, keys + p * d, d) * scale;
        largest = std::max(largest, scores[p]);
    }
    float total = 0.0f;
    for (std::size_t p = 0; p < count; ++p) {
        scores[p] = std::exp(scores[p] - largest);
        total += scores[p];
    }
    const float inverse = 1.0f / total;
    std::size_t i = 0;
    for (; i + lanes <= d; i += lanes) {
        Floats sum{}, v;
        for (std::size_t p = 0; p < count; ++p) {
            load(v, values + p * d + i);
            sum += v * scores[p];
        }
        sum = sum * inverse;
        store(out + i, sum);
    }
    for (; i < d; ++i) {
        float sum = 0.0f;
        for (std::size_t p = 0; p < count; ++p) sum += values[p * d + i] * scores[p];
        out[i] = sum * inverse;
    }
}
ACTLAS_FOR_LEVELS(one_head,
                  (const float *q, const float *keys, const float *values, float *scores, float *out,
                   std::size_t count, std::size_t d, float scale),
                  (q, keys, values, scores, out, count, d, scale))

std::size_t share(std::size_t n, int part, int parts) {
    return n * static_cast<std::size_t>(part) / static_cast<std::size_t>(parts);
}

// A part of several linear layers of the same inputs, as if their rows were one list of blocks.
struct Target {
    const Linear *weights;
    float *out;
};

void apply_share(const Target *targets, std::size_t count, const Inputs &in, int part, int parts, Level level) {
    std::size_t total = 0;
    for (std::size_t i = 0; i < count; ++i) total += targets[i].weights->blocks();
    const std::size_t from = share(total, part, parts), to = share(total, part + 1, parts);
    std::size_t first = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::size_t n = targets[i].weights->blocks();
        const std::size_t begin = std::max(from, first), end = std::min(to, first + n);
        if (begin < end) {
            apply_linear(*targets[i].weights, in, targets[i].out, targets[i].weights->rows, begin - first,
                         end - first, level);
        }
        first += n;
    }
}

}  // namespace

void Decoder::Room::fit(std::size_t tokens, std::size_t columns) {
    const std::size_t groups = (columns + kGroup - 1) / kGroup;
    high.resize(tokens * columns);
    low.resize(tokens * columns);
    scale.resize(tokens * groups);
    sum.resize(tokens * groups);
    whole.resize(tokens * groups);
}

Inputs Decoder::Room::inputs(const float *x, std::size_t tokens, std::size_t columns, bool two) {
    return {x, high.data(), two ? low.data() : nullptr, scale.data(), sum.data(), whole.data(), tokens, columns};
}

Decoder::Decoder(const DecoderShape &shape, const float *cosines, const float *sines, int threads, Level level)
    : shape_(shape), cosines_(cosines), sines_(sines), level_(level),
      cache_(shape.kv_heads * shape.length * shape.head_dim), team_(std::max(threads, 1)) {
    const std::size_t t = kMostTokens, q = shape.heads * shape.head_dim, kv = shape.kv_heads * shape.head_dim;
    normed_.resize(t * shape.d);
    query_.resize(t * q);
    key_.resize(t * kv);
    value_.resize(t * kv);
    mixed_.resize(t * q);
    inner_.resize(2 * t * shape.hidden);
    out_.resize(t * shape.d);
    narrow_.fit(t, shape.d);
    wide_.fit(t, shape.hidden);
    heads_.fit(t, q);
    const std::size_t widest = std::max({shape.d, q, shape.hidden});
    masked_.resize(widest * t);
    masked_room_.fit(t, widest);
    active_.resize(widest + 1);
    starts_.resize(widest / kGroup + 2);
    partial_.assign(static_cast<std::size_t>(team_.size()), {});
    scores_.assign(static_cast<std::size_t>(team_.size()), std::vector<float>(shape.length));
}

void Decoder::add(const BlockWeights &block) {
    blocks_.push_back(block);
    keys_.resize(blocks_.size() * cache_);
    values_.resize(blocks_.size() * cache_);
}

void Decoder::head(const Linear &weights, const float *norm) {
    head_ = weights;
    final_norm_ = norm;
}

Inputs Decoder::prepared(Room &room, const float *x, std::size_t tokens, std::size_t columns, bool packed) {
    const Inputs in = room.inputs(x, tokens, columns, shape_.two_bytes);
    if (packed) quantise(in, level_);
    return in;
}

void Decoder::rotate(const BlockWeights &w, std::size_t block, std::size_t tokens, std::size_t position) {
    const std::size_t d = shape_.head_dim, half = d / 2;
    float *keys = this->keys(block), *values = this->values(block);
    for (std::size_t t = 0; t < tokens; ++t) {
        const float *cosine = cosines_ + (position + t) * half, *sine = sines_ + (position + t) * half;
        const auto turn = [&](float *x, const float *gain) {
            if (gain) rms_norm(x, gain, x, d, shape_.eps);
            for (std::size_t i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a * cosine[i] - b * sine[i];
                x[i + half] = b * cosine[i] + a * sine[i];
            }
        };
        for (std::size_t h = 0; h < shape_.heads; ++h) turn(&query_[(t * shape_.heads + h) * d], w.q_norm);
        for (std::size_t h = 0; h < shape_.kv_heads; ++h) {
            float *k = &key_[(t * shape_.kv_heads + h) * d];
            turn(k, w.k_norm);
            std::memcpy(keys + (h * shape_.length + position + t) * d, k, d * sizeof(float));
            std::memcpy(values + (h * shape_.length + position + t) * d, &value_[(t * shape_.kv_heads + h) * d],
                        d * sizeof(float));
        }
    }
}

void Decoder::attention(std::size_t block, std::size_t tokens, std::size_t position) {
    const std::size_t d = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
    const auto head = one_head_for(level_);
    team_.run([&](int part, int parts) {
        const std::size_t total = tokens * shape_.heads;
        float *scores = scores_[static_cast<std::size_t>(part)].data();
        for (std::size_t i = share(total, part, parts); i < share(total, part + 1, parts); ++i) {
            const std::size_t t = i / shape_.heads, h = i % shape_.heads, offset = h / group * shape_.length * d;
            head(&query_[i * d], keys(block) + offset, values(block) + offset, scores, &mixed_[i * d],
                 position + t + 1, d, shape_.attention_scale);
        }
    });
}

// The share of active inputs above which reading all rows in order is faster than gathering columns, by format;
// about where `bench columns` finds the two equal.
static double dense_above(ColumnFormat format) {
    const bool few_bits = format == ColumnFormat::q4 || format == ColumnFormat::q2;
    return few_bits ? 0.55 : format == ColumnFormat::q8 ? 0.7 : 0.9;
}

// One token, one layer. With few active inputs the threads share out their columns, and their sums are added up;
// with many, the whole layer is read, with zeros for the inputs that are skipped.
void Decoder::sparse_layer(const Layer &layer, float *out, const float *x) {
    const Columns &w = layer.columns;
    const std::size_t n = w.columns, groups = (n + kGroup - 1) / kGroup, padded = w.padded();
    for (std::size_t i = 0; i < n; ++i) masked_[i] = std::fabs(x[i]) >= layer.threshold[i] ? x[i] : 0.0f;
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) kept += masked_[i] != 0.0f;
    if (static_cast<double>(kept) > dense_above(w.format) * static_cast<double>(n)) {
        read_ += kept;
        skipped_ += n - kept;
        const Target target[] = {{&layer.whole, out}};
        const Inputs in = prepared(masked_room_, masked_.data(), 1, n, layer.whole.format != Format::f32);
        team_.run([&](int part, int parts) { apply_share(target, 1, in, part, parts, level_); });
        return;
    }
    const Inputs in = prepared(masked_room_, masked_.data(), 1, n, w.packed());
    const std::size_t count = find_active(masked_.data(), n, active_.data(), starts_.data());
    read_ += count;
    skipped_ += n - count;
    team_.run([&](int part, int parts) {
        std::vector<float> &sums = partial_[static_cast<std::size_t>(part)];
        sums.assign(padded, 0.0f);
        // Equal numbers of active columns for each thread, in whole groups.
        const auto edge = [&](int which) {
            const auto wanted = static_cast<std::int32_t>(share(count, which, parts));
            if (which == parts) return groups;
            std::size_t g = 0;
            while (g < groups && starts_[g] < wanted) ++g;
            return g;
        };
        add_columns(w, in, active_.data(), starts_.data(), edge(part), edge(part + 1), sums.data(), level_);
    });
    const float *bias = layer.whole.bias;
    for (std::size_t r = 0; r < w.rows; ++r) {
        float total = bias ? bias[r] : 0.0f;
        for (const auto &part : partial_) total += part[r];
        out[r] = total;
    }
}

// Several layers of the same inputs [tokens, columns]. Dense ones go together; sparse ones one by one.
void Decoder::layers(const Layer *const *layers, float *const *outs, std::size_t count, Room &room, const float *x,
                     std::size_t tokens) {
    Target targets[3];
    std::size_t dense = 0;
    bool packed = false;
    for (std::size_t i = 0; i < count; ++i) {
        if (sparse(*layers[i])) continue;
        targets[dense++] = {&layers[i]->whole, outs[i]};
        packed = packed || layers[i]->whole.format != Format::f32;
    }
    if (dense > 0) {
        const Inputs in = prepared(room, x, tokens, layers[0]->whole.columns, packed);
        team_.run([&](int part, int parts) { apply_share(targets, dense, in, part, parts, level_); });
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (!sparse(*layers[i])) continue;
        const std::size_t n = layers[i]->whole.columns;
        if (tokens == 1) {
            sparse_layer(*layers[i], outs[i], x);
            continue;
        }
        for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t c = 0; c < n; ++c) {
                const float value = x[t * n + c];
                masked_[t * n + c] = std::fabs(value) >= layers[i]->threshold[c] ? value : 0.0f;
            }
        }
        const Target target[] = {{&layers[i]->whole, outs[i]}};
        const Inputs in =
            prepared(masked_room_, masked_.data(), tokens, n, layers[i]->whole.format != Format::f32);
        team_.run([&](int part, int parts) { apply_share(target, 1, in, part, parts, level_); });
    }
}

void Decoder::run(float *x, std::size_t tokens, std::size_t position, std::size_t begin, std::size_t end,
                  bool skip) {
    skip_ = skip;
    const std::size_t d = shape_.d, hidden = shape_.hidden;
    for (std::size_t b = begin; b < end; ++b) {
        const BlockWeights &w = blocks_[b];
        for (std::size_t t = 0; t < tokens; ++t) {
            rms_norm(x + t * d, w.attention_norm, &normed_[t * d], d, shape_.eps);
        }
        const Layer *const three[] = {&w.q, &w.k, &w.v};
        float *const into[] = {query_.data(), key_.data(), value_.data()};
        layers(three, into, 3, narrow_, normed_.data(), tokens);
        rotate(w, b, tokens, position);
        attention(b, tokens, position);

        const Layer *const output[] = {&w.o};
        float *const out[] = {out_.data()};
        layers(output, out, 1, heads_, mixed_.data(), tokens);
        for (std::size_t i = 0; i < tokens * d; ++i) x[i] += out_[i];

        for (std::size_t t = 0; t < tokens; ++t) {
            rms_norm(x + t * d, w.mlp_norm, &normed_[t * d], d, shape_.eps);
        }
        float *gate = inner_.data(), *up = inner_.data() + kMostTokens * hidden;
        const auto multiply = [&](std::size_t from, std::size_t to) {
            for (std::size_t t = 0; t < tokens; ++t) {
                for (std::size_t i = from; i < to; ++i) {
                    gate[t * hidden + i] = activated(gate[t * hidden + i], shape_.activation) * up[t * hidden + i];
                }
            }
        };
        if (sparse(w.gate) || sparse(w.up)) {
            const Layer *const two[] = {&w.gate, &w.up};
            float *const pair[] = {gate, up};
            layers(two, pair, 2, narrow_, normed_.data(), tokens);
            multiply(0, hidden);
        } else {  // one meeting of the threads: each multiplies the rows that it computed
            const Linear &first = w.gate.whole, &second = w.up.whole;
            const Inputs in = prepared(narrow_, normed_.data(), tokens, d,
                                       first.format != Format::f32 || second.format != Format::f32);
            team_.run([&](int part, int parts) {
                const std::size_t n = first.blocks();
                const std::size_t from = share(n, part, parts), to = share(n, part + 1, parts);
                apply_linear(first, in, gate, hidden, from, to, level_);
                apply_linear(second, in, up, hidden, from, to, level_);
                multiply(from * kRows, std::min(to * kRows, hidden));
            });
        }
        const Layer *const down[] = {&w.down};
        layers(down, out, 1, wide_, gate, tokens);
        for (std::size_t i = 0; i < tokens * d; ++i) x[i] += out_[i];
    }
}

void Decoder::logits(const float *x, float *out) {
    rms_norm(x, final_norm_, normed_.data(), shape_.d, shape_.eps);
    const Inputs in = prepared(narrow_, normed_.data(), 1, shape_.d, head_.format != Format::f32);
    const Target target[] = {{&head_, out}};
    team_.run([&](int part, int parts) { apply_share(target, 1, in, part, parts, level_); });
}

}  // namespace actlas
