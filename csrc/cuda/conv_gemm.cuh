// Two of the three matrix products of a convolution, per group of channels, in one kernel (the third:
// conv_grad_weight.cuh):
//   forward       y (pixels, K)  = im2col(x) (pixels, taps·C) · w (K, taps·C)ᵀ          and statistics of y
//   grad_input    dx (pixels, C) = gathered dy (pixels, taps·K) · wᵀ (C, taps·K)ᵀ       dy made from y and grad
// A block computes 128 × 64 of the result (gemm.cuh); blocks that share pixels are neighbours.
#pragma once
#include "conv_output.cuh"

namespace convbn {

struct GemmShape {
  Gather rows;                 // the gathered operand
  Gather weight;               // the other: (columns of the result, taps·channels) of one group
  int depth = 0, tiles_n = 0;  // taps·channels; tiles side by side
  int columns = 0;             // of the result, per group
  int stride = 0;              // scalars between rows of the result
};

template <class P, class Source, int V>
__global__ void __launch_bounds__(kThreads, kGemmResident<P>)
    conv_gemm_kernel(GemmShape s, Source source, Values<typename Source::scalar_t> weight,
                     typename Source::scalar_t* __restrict__ out, double* __restrict__ partial) {
  using scalar_t = typename Source::scalar_t;
  CONVBN_DYNAMIC_SHARED(char, shared);
  const int tile_n = blockIdx.x % s.tiles_n, tile_m = blockIdx.x / s.tiles_n, group = blockIdx.y;
  const int64_t first_pixel = int64_t{tile_m} * kTileM;
  const int first_column = tile_n * kTileN;

  weight.x += int64_t{group} * s.columns * s.depth;
  Operand<typename P::template Layout<kTileM>, Source, V> a(s.rows, source, group, shared, first_pixel, s.rows.pixels,
                                                            0);
  Operand<typename P::template Layout<kTileN>, Values<scalar_t>, V> b(s.weight, weight, 0, shared + kTileM * kStepBytes,
                                                                      first_column, s.weight.pixels, 0);
  P product;
  multiply_tiles(product, a, b, (s.depth + kDepth<scalar_t> - 1) / kDepth<scalar_t>);

  const int64_t pixels_left = s.rows.pixels - first_pixel;
  const Extent extent{pixels_left < kTileM ? static_cast<int>(pixels_left) : kTileM,
                      s.columns - first_column < kTileN ? s.columns - first_column : kTileN};
  const OutputTile<scalar_t> tile{reinterpret_cast<scalar_t*>(shared)};
  product.for_each([&](int row, int column, const auto& values) { tile.put(row, column, values); });
  __syncthreads();
  const int channel = group * s.columns + first_column;
  tile.template write<V>(out + first_pixel * s.stride + channel, s.stride, extent);
  if (partial) {
    tile.statistics(reinterpret_cast<double*>(shared + kTileBytes),
                    partial + (int64_t{tile_m} * Moments::kFields) * s.stride + channel, s.stride, extent);
  }
}

}  // namespace convbn
