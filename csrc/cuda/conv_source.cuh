// What the elements of a gathered matrix are: values of a tensor, or dy or its parts made from y and grad on the way.
//   Raw<V>               V neighbouring scalars as they lie in memory, 16 bytes per tensor where V is kPack
//   load<V>(offset)      fetches them
//   values(raw, c, x)    what they mean, in float; c is the first one's channel
#pragma once
#include "bn_elementwise.cuh"

namespace convbn {

// V scalars as one access; a struct of scalars could be split.
template <typename scalar_t, int V>
struct Words {
  using type = Pack<scalar_t, V>;
};
template <typename scalar_t, int V>
  requires(sizeof(scalar_t) * V == 16)
struct Words<scalar_t, V> {
  using type = uint4;
};

template <typename scalar_t, int V>
__device__ __forceinline__ void unpack(const typename Words<scalar_t, V>::type& words, float (&x)[V]) {
  Pack<scalar_t, V> pack;
  memcpy(&pack, &words, sizeof pack);
#pragma unroll
  for (int l = 0; l < V; ++l) x[l] = to_acc(pack.value[l]);
}

template <typename T, int V>
__device__ __forceinline__ typename Words<T, V>::type load_words(const T* p) {
  return *reinterpret_cast<const typename Words<T, V>::type*>(p);
}

template <typename scalar>
struct Values {
  using scalar_t = scalar;
  static constexpr bool kDirect = true;  // nothing to compute: may go to shared memory by itself
  template <int V>
  using Raw = typename Words<scalar_t, V>::type;

  const scalar_t* x;

  template <int V>
  __device__ __forceinline__ Raw<V> load(int64_t offset) const {
    return load_words<scalar_t, V>(x + offset);
  }
  template <int V>
  __device__ __forceinline__ void values(const Raw<V>& raw, int, float (&result)[V]) const {
    unpack<scalar_t, V>(raw, result);
  }
};

// g = grad where v > 0, else slope·grad, and d = y − μ, with v = out, or d·scale + bias.
template <typename scalar>
struct MaskedGradient {
  using scalar_t = scalar;
  static constexpr bool kDirect = false;
  template <int V>
  struct Raw {
    typename Words<scalar_t, V>::type y, grad, out;
  };

  const scalar_t *y, *grad, *out;
  const float* table;  // rows of C values: mean, scale, bias, and a guess of mean(g) or, for NormGradient, a, b, c
  int channels;
  float slope;  // 1: identity

  template <int V>
  __device__ __forceinline__ Raw<V> load(int64_t offset) const {
    Raw<V> raw;
    raw.y = load_words<scalar_t, V>(y + offset);
    raw.grad = load_words<scalar_t, V>(grad + offset);
    raw.out = out ? load_words<scalar_t, V>(out + offset) : typename Words<scalar_t, V>::type{};
    return raw;
  }
  template <int V>
  __device__ __forceinline__ void row(int r, int channel, float (&x)[V]) const {
    const float* from = table + int64_t{r} * channels + channel;
    if constexpr (V % 4 == 0) {
#pragma unroll
      for (int l = 0; l < V; l += 4) {
        float four[4];
        unpack<float, 4>(load_words<float, 4>(from + l), four);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[l + i] = four[i];
      }
    } else {
      load_pack<V>(from, V, x);
    }
  }
  template <int V>
  __device__ __forceinline__ void parts(const Raw<V>& raw, int channel, float (&g)[V], float (&d)[V]) const {
    float p[V], q[V];
    unpack<scalar_t, V>(raw.y, d);
    unpack<scalar_t, V>(raw.grad, g);
    row<V>(0, channel, p);
#pragma unroll
    for (int l = 0; l < V; ++l) d[l] -= p[l];
    if (slope == 1) return;
    float v[V];
    if (out) {
      unpack<scalar_t, V>(raw.out, v);
    } else {
      row<V>(1, channel, p);
      row<V>(2, channel, q);
#pragma unroll
      for (int l = 0; l < V; ++l) v[l] = d[l] * p[l] + q[l];
    }
#pragma unroll
    for (int l = 0; l < V; ++l) {
      if (v[l] <= 0) g[l] = slope == 0 ? 0.f : g[l] * slope;
    }
  }
  template <int V>
  __device__ __forceinline__ void guess(int channel, float (&s)[V]) const {
    if constexpr (std::is_same_v<scalar_t, float>) {
      row<V>(3, channel, s);
    } else {
#pragma unroll
      for (int l = 0; l < V; ++l) s[l] = 0;
    }
  }
};

// dy = a·g + b·(y − μ) + c
template <typename scalar_t>
struct NormGradient : MaskedGradient<scalar_t> {
  static constexpr int kRows = 6;  // of the table: what BackwardAffine holds

  template <int V>
  __device__ __forceinline__ void values(const typename MaskedGradient<scalar_t>::template Raw<V>& raw, int channel,
                                         float (&dy)[V]) const {
    float g[V], p[V], q[V];
    this->template parts<V>(raw, channel, g, dy);
    this->template row<V>(3, channel, p);
#pragma unroll
    for (int l = 0; l < V; ++l) g[l] *= p[l];
    this->template row<V>(4, channel, p);
    this->template row<V>(5, channel, q);
#pragma unroll
    for (int l = 0; l < V; ++l) dy[l] = g[l] + p[l] * dy[l] + q[l];
  }
};

}  // namespace convbn
