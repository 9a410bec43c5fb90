// Activations: value at v, and the gradient g·act′(v). NaN passes through all of them.
#pragma once
#include "../activation.h"
#include "device.cuh"

namespace convbn {

struct Identity {
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc) {
    return v;
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc, acc g, acc) {
    return g;
  }
};

struct Relu {
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc) {
    return v <= 0 ? acc(0) : v;
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc v, acc g, acc) {
    return v <= 0 ? acc(0) : g;
  }
};

struct LeakyRelu {
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc slope) {
    return v > 0 ? v : v * slope;
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc v, acc g, acc slope) {
    return v > 0 ? g : g * slope;
  }
};

struct Silu {  // v·s with s = 1/(1 + e⁻ᵛ);  s·(1 + v·(1 − s))
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc) {
    return v / (1 + std::exp(-v));
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc v, acc g, acc) {
    const acc s = 1 / (1 + std::exp(-v));
    return g * s * (1 + v * (1 - s));
  }
};

struct Gelu {  // v·Φ(v);  Φ(v) + v·φ(v)
  template <typename acc>
  static __device__ __forceinline__ acc cdf(acc v) {
    return acc(0.5) * (1 + std::erf(v * acc(0.70710678118654752440)));
  }
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc) {
    return v * cdf(v);
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc v, acc g, acc) {
    const acc pdf = acc(0.39894228040143267794) * std::exp(v * v * acc(-0.5));
    return g * (cdf(v) + v * pdf);
  }
};

struct Hardswish {  // v·min(max(v + 3, 0), 6)/6
  template <typename acc>
  static __device__ __forceinline__ acc value(acc v, acc) {
    const acc t = v + 3;
    return v * (t < 0 ? acc(0) : t > 6 ? acc(6) : t) / 6;
  }
  template <typename acc>
  static __device__ __forceinline__ acc gradient(acc v, acc g, acc) {
    return v <= -3 ? acc(0) : v < 3 ? g * (v / 3 + acc(0.5)) : g;
  }
};

// f(Act{}) for the activation named at run time.
template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::identity:
      return f(Identity{});
    case Activation::relu:
      return f(Relu{});
    case Activation::leaky_relu:
      return f(LeakyRelu{});
    case Activation::silu:
      return f(Silu{});
    case Activation::gelu:
      return f(Gelu{});
    case Activation::hardswish:
      return f(Hardswish{});
  }
}

}  // namespace convbn
