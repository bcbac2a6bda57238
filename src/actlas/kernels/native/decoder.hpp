// A decoder of the llama kind, for one sequence: blocks, their static key-value cache, and the output head.
//
//   h = x + W_o attention(rope(W_q n(x)), rope(W_k n(x)), W_v n(x))       n: RMS norm, grouped heads, causal
//   y = h + W_down (f(W_gate m(h)) * W_up m(h))                           m: RMS norm
//
// Blocks can be run a few at a time, so that a caller may change the residual stream between them.
#pragma once

#include <memory>
#include <vector>

#include "activation.hpp"
#include "columns.hpp"
#include "packed.hpp"
#include "team.hpp"

namespace actlas {

// A linear layer of a block. Where it has columns and thresholds, inputs with |x_i| < threshold_i are skipped;
// one token at a time reads only the active columns, several read the whole weight.
struct Layer {
    Linear whole;
    Columns columns;
    const float *threshold = nullptr;  // [columns], or null: dense
};

struct BlockWeights {
    Layer q, k, v, o, gate, up, down;
    const float *attention_norm = nullptr, *mlp_norm = nullptr;  // [d]
    const float *q_norm = nullptr, *k_norm = nullptr;            // [head_dim], or null
};

struct DecoderShape {
    std::size_t d = 0, heads = 0, kv_heads = 0, head_dim = 0, hidden = 0, length = 0;
    float eps = 1e-6f, attention_scale = 0.0f;
    bool two_bytes = true;  // activations of packed products
    Activation activation = Activation::silu;
};

class Decoder {
  public:
    Decoder(const DecoderShape &shape, const float *cosines, const float *sines, int threads, Level level);

    void add(const BlockWeights &block);
    void head(const Linear &weights, const float *norm);
    std::size_t blocks() const { return blocks_.size(); }
    const DecoderShape &shape() const { return shape_; }

    // Runs blocks begin ... end - 1 in place on x [tokens, d], whose first token has this position; what
    // lies in the cache before it is attended to. tokens <= 8, position + tokens <= length.
    // `skip`: sparse layers leave inputs out; without, they are dense.
    void run(float *x, std::size_t tokens, std::size_t position, std::size_t begin, std::size_t end, bool skip);

    // Final norm and output head of one token.
    void logits(const float *x, float *out);

    // Inputs of sparse layers so far: how many were read, and how many were skipped.
    std::uint64_t inputs_read() const { return read_; }
    std::uint64_t inputs_skipped() const { return skipped_; }

    // Keys (rotated) or values of a block, [kv_heads, length, head_dim].
    float *keys(std::size_t block) { return keys_.data() + block * cache_; }
    float *values(std::size_t block) { return values_.data() + block * cache_; }

  private:
    struct Room {
        std::vector<std::int8_t> high, low;
        std::vector<float> scale, sum;
        std::vector<std::int32_t> whole;
        void fit(std::size_t tokens, std::size_t columns);
        Inputs inputs(const float *x, std::size_t tokens, std::size_t columns, bool two);
    };

    Inputs prepared(Room &room, const float *x, std::size_t tokens, std::size_t columns, bool packed);
    void layers(const Layer *const *layers, float *const *outs, std::size_t count, Room &room, const float *x,
                std::size_t tokens);
    bool sparse(const Layer &layer) const { return skip_ && layer.threshold != nullptr; }
    void sparse_layer(const Layer &layer, float *out, const float *x);
    void attention(std::size_t block, std::size_t tokens, std::size_t position);
    void rotate(const BlockWeights &w, std::size_t block, std::size_t tokens, std::size_t position);

    DecoderShape shape_;
    const float *cosines_, *sines_;  // [length, head_dim / 2]
    Level level_;
    std::size_t cache_ = 0;
    std::vector<BlockWeights> blocks_;
    Linear head_;
    const float *final_norm_ = nullptr;
    std::vector<float> keys_, values_;
    std::vector<float> normed_, query_, key_, value_, mixed_, inner_, out_;
    Room narrow_, wide_, heads_, masked_room_;
    std::vector<float> masked_;
    std::vector<std::int32_t> active_, starts_;
    std::vector<std::vector<float>> partial_;
    bool skip_ = true;
    std::uint64_t read_ = 0, skipped_ = 0;
    std::vector<std::vector<float>> scores_;
    Team team_;
};

}  // namespace actlas
