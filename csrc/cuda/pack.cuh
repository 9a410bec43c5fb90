// Scalars, their arithmetic type, and packs of V consecutive scalars that move as one access (16 bytes when V is
// kPack).
#pragma once
#include "device.cuh"

namespace convbn {

// Arithmetic is float, but double for double.
template <typename scalar_t>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename Arithmetic<scalar_t>::type;

template <typename scalar_t>
constexpr int kPack = 16 / sizeof(scalar_t);

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar_t, typename acc>
__device__ __forceinline__ scalar_t from_acc(acc x) {
  if constexpr (std::is_same_v<scalar_t, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <typename scalar_t, int V>
struct alignas(V * sizeof(scalar_t)) Pack {
  scalar_t value[V];
};

// p[0 … count): a whole pack is one access, a part of one goes scalar by scalar, behind it are zeros.
template <int V, typename scalar_t>
__device__ __forceinline__ Pack<scalar_t, V> read_pack(const scalar_t* p, int count) {
  if (count >= V) return *reinterpret_cast<const Pack<scalar_t, V>*>(p);
  Pack<scalar_t, V> pack;
#pragma unroll
  for (int l = 0; l < V; ++l) pack.value[l] = l < count ? p[l] : from_acc<scalar_t>(acc_t<scalar_t>(0));
  return pack;
}

template <int V, typename scalar_t>
__device__ __forceinline__ void unpack(const Pack<scalar_t, V>& pack, acc_t<scalar_t> (&x)[V]) {
#pragma unroll
  for (int l = 0; l < V; ++l) x[l] = to_acc(pack.value[l]);
}

template <int V, typename scalar_t>
__device__ __forceinline__ void load_pack(const scalar_t* p, int count, acc_t<scalar_t> (&x)[V]) {
  unpack<V>(read_pack<V>(p, count), x);
}

template <int V, typename scalar_t>
__device__ __forceinline__ void store_pack(scalar_t* p, int count, const acc_t<scalar_t> (&x)[V]) {
  if (count >= V) {
    Pack<scalar_t, V> pack;
#pragma unroll
    for (int l = 0; l < V; ++l) pack.value[l] = from_acc<scalar_t>(x[l]);
    if constexpr (sizeof pack == 16) {  // one store, which the compiler may not split
      uint4 words;
      memcpy(&words, &pack, sizeof pack);
      __stwb(reinterpret_cast<uint4*>(p), words);
    } else {
      *reinterpret_cast<Pack<scalar_t, V>*>(p) = pack;
    }
  } else {
#pragma unroll
    for (int l = 0; l < V; ++l) {
      if (l < count) p[l] = from_acc<scalar_t>(x[l]);
    }
  }
}

}  // namespace convbn
