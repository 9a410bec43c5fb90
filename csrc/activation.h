// The activations that every backend knows. No torch header: CUDA kernels and CPU loops include it too.
#pragma once

namespace convbn {

enum class Activation : int { identity, relu, leaky_relu, silu, gelu, hardswish };
constexpr int kActivations = 6;

}  // namespace convbn
