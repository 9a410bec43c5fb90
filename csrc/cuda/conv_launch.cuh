// From a convolution's shape to kernels: which product, pack size, grid, splits.
#pragma once
#include "bn_launch.cuh"
#include "conv_depthwise.cuh"
#include "conv_gemm.cuh"

namespace convbn {

// f(scalar_t{}): half types and float.
template <class F>
void with_float_scalar(Scalar scalar, F f) {
  switch (scalar) {
    case Scalar::f16:
      return f(__half{});
    case Scalar::bf16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// Whole 16-byte chunks: every tensor aligned, and every group of channels a multiple of a chunk.
template <typename scalar_t>
int chunk_size(const ConvProblem& p, std::initializer_list<const void*> tensors) {
  const int per_group = p.depthwise() ? p.channels : std::gcd(p.channels / p.groups, p.out_channels / p.groups);
  bool whole = per_group % kPack<scalar_t> == 0;
  for (const void* t : tensors) whole = whole && aligned16(t);
  return whole ? kPack<scalar_t> : 1;
}

// f(Product<…>{}) along k or not.
template <typename scalar_t, bool along_k, class F>
void with_product(const ConvProblem& p, F f) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (!p.tensor_cores) return f(std::type_identity<Product<float, false, along_k>>{});
  }
  f(std::type_identity<Product<scalar_t, true, along_k>>{});
}

template <typename scalar_t>
MaskedGradient<scalar_t> masked_gradient(const BnProblem& bn, const float* table) {
  const bool identity = bn.activation == Activation::identity;
  const float slope = identity ? 1.f : bn.activation == Activation::relu ? 0.f : static_cast<float>(bn.slope);
  const auto tensor = [](const void* p) { return static_cast<const scalar_t*>(p); };
  return {tensor(bn.y), tensor(bn.grad), identity ? nullptr : tensor(bn.out), table, static_cast<int>(bn.channels),
          slope};
}

inline int tiles_of(int64_t size, int tile) { return static_cast<int>(ceil_div(size, tile)); }

// forward and grad_input: out (pixels of `rows`, out_channels).
template <typename scalar_t, class Source>
void launch_product(const ConvProblem& p, const Gather& rows, const Source& source, int out_channels, int chunk,
                    const void* weight_, void* out_, double* partial, CUstream_st* stream) {
  const auto* weight = static_cast<const scalar_t*>(weight_);
  auto* out = static_cast<scalar_t*>(out_);
  const auto tiles_m = static_cast<unsigned>(ceil_div(rows.pixels, kTileM));
  if (p.depthwise()) {
    with_pack<scalar_t>(chunk, [&](auto V) {
      CONVBN_LAUNCH((depthwise_kernel<Source, V>), dim3(tiles_m, tiles_of(out_channels, kTileN)), kThreads, kGemmShared,
                    stream, rows, source, weight, out, partial);
    });
    return;
  }
  GemmShape s;
  s.rows = rows;
  s.columns = out_channels / p.groups;
  s.depth = rows.columns();
  s.weight = gather_itself(s.columns, s.depth, s.depth);
  s.tiles_n = tiles_of(s.columns, kTileN);
  s.stride = out_channels;
  with_product<scalar_t, true>(p, [&]<class P>(std::type_identity<P>) {
    with_pack<scalar_t>(chunk, [&](auto V) {
      CONVBN_LAUNCH((conv_gemm_kernel<P, Source, V>), dim3(tiles_m * s.tiles_n, p.groups), kThreads, kGemmShared,
                    stream, s, source, Values<scalar_t>{weight}, out, partial);
    });
  });
}

}  // namespace convbn
