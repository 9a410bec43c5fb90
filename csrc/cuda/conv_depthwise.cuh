// Depthwise convolution (one channel per group, in and out), where a matrix product would be all padding:
//   y[p, c] = Σ_taps w[tap, c] · x[gather(p, tap), c];  grad_input is the same with the adjoint gather of dy
// A thread owns a pack of V channels, a block 64 channels of 128 pixels; outputs and statistics go the way of
// conv_output.cuh. grad_weight: conv_grad_weight.cuh.
#pragma once
#include "conv_output.cuh"

namespace convbn {

template <class Source, int V>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_kernel(Gather g, Source source, const typename Source::scalar_t* __restrict__ weight,
                     typename Source::scalar_t* __restrict__ out, double* __restrict__ partial) {
  using scalar_t = typename Source::scalar_t;
  constexpr int kAcross = kTileN / V, kDown = kThreads / kAcross;
  CONVBN_DYNAMIC_SHARED(char, shared);
  const OutputTile<scalar_t> tile{reinterpret_cast<scalar_t*>(shared)};
  const int column = threadIdx.x % kAcross * V, first_channel = blockIdx.y * kTileN, channel = first_channel + column;
  const int64_t first_pixel = int64_t{blockIdx.x} * kTileM, left = g.pixels - first_pixel;
  const Extent extent{left < kTileM ? static_cast<int>(left) : kTileM,
                      g.channels - first_channel < kTileN ? g.channels - first_channel : kTileN};

  for (int row = threadIdx.x / kAcross; row < extent.rows && column < extent.columns; row += kDown) {
    const Pixel pixel(g, first_pixel + row, g.pixels);
    float sum[V] = {};
    Column tap;
    for (tap.r = 0; tap.r < g.kernel[0]; ++tap.r) {
      for (tap.s = 0; tap.s < g.kernel[1]; ++tap.s) {
        const int64_t offset = locate(g, pixel, tap);
        if (offset < 0) continue;
        float x[V], w[V];
        source.template values<V>(source.template load<V>(offset + channel), channel, x);
        load_pack<V>(weight + int64_t{tap.r * g.kernel[1] + tap.s} * g.channels + channel, V, w);
#pragma unroll
        for (int l = 0; l < V; ++l) sum[l] += w[l] * x[l];
      }
    }
    tile.put(row, column, sum);
  }
  __syncthreads();
  tile.template write<V>(out + first_pixel * g.channels + first_channel, g.channels, extent);
  if (partial) {
    tile.statistics(reinterpret_cast<double*>(shared + kTileBytes),
                    partial + (int64_t{blockIdx.x} * Moments::kFields) * g.channels + first_channel, g.channels,
                    extent);
  }
}

}  // namespace convbn
