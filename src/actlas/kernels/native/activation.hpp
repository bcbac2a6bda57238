// The activations of MLPs.
#pragma once

#include <cmath>

namespace actlas {

enum class Activation { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3, relu_squared = 4 };

inline float activated(float x, Activation kind) {
    switch (kind) {
        case Activation::silu: return x / (1.0f + std::exp(-x));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
        case Activation::gelu: return 0.5f * x * (1.0f + std::erf(x * 0.7071067811865476f));
        case Activation::relu: return x > 0.0f ? x : 0.0f;
        case Activation::relu_squared: return x > 0.0f ? x * x : 0.0f;
    }
    return x;
}

}  // namespace actlas
