// Launchers of the forward convolution and its statistics.
#include "conv_launch.cuh"

namespace convbn {

namespace {

int pixel_tiles(const ConvProblem& p) { return tiles_of(gather_input(p).pixels, kTileM); }

// partial[tile][field][channel] of the forward product, united: 32 channels × 32 tiles at a time per block.
__global__ void __launch_bounds__(kWarp* kWarp)
    conv_statistics_kernel(const double* __restrict__ partial, int channels, int tiles, double* __restrict__ mean,
                           double* __restrict__ var) {
  __shared__ double shared[MomentSums::kFields][kWarp][kWarp + 1];
  const auto moments_of = [&](int tile, int channel) {
    Moments moments;
#pragma unroll
    for (int i = 0; i < Moments::kFields; ++i) {
      moments.field(i) = partial[(int64_t{tile} * Moments::kFields + i) * channels + channel];
    }
    return moments;
  };
  const int channel = blockIdx.x * kWarp + threadIdx.x;
  MomentSums sum;
  if (channel < channels) {
    const double pivot = moments_of(0, channel).mean;
#pragma unroll 4
    for (int tile = threadIdx.y; tile < tiles; tile += kWarp) sum.add(MomentSums(moments_of(tile, channel), pivot));
  }
#pragma unroll
  for (int i = 0; i < MomentSums::kFields; ++i) shared[i][threadIdx.y][threadIdx.x] = sum.field(i);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MomentSums::kFields; ++i) sum.field(i) = shared[i][threadIdx.x][threadIdx.y];
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    MomentSums next;
#pragma unroll
    for (int i = 0; i < MomentSums::kFields; ++i) next.field(i) = __shfl_down_sync(kFullMask, sum.field(i), half);
    sum.add(next);
  }
  const int mine = blockIdx.x * kWarp + threadIdx.y;  // of the transposed block: a warp per channel
  if (threadIdx.x || mine >= channels) return;
  const Moments moments = sum.about(moments_of(0, mine).mean);
  mean[mine] = moments.mean;
  var[mine] = moments.m2 / moments.count;
}

}  // namespace

int64_t conv_statistics_size(const ConvProblem& p) {
  return int64_t{pixel_tiles(p)} * Moments::kFields * p.out_channels;
}

void launch_conv_forward(const ConvProblem& p, const void* x, const void* weight, void* y, double* scratch,
                         CUstream_st* stream) {
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    const Values<scalar_t> input{static_cast<const scalar_t*>(x)};
    launch_product<scalar_t>(p, gather_input(p), input, p.out_channels, chunk_size<scalar_t>(p, {x, weight, y}), weight,
                             y, scratch, stream);
  });
}

void launch_conv_statistics(const ConvProblem& p, const double* scratch, double* mean, double* var,
                            CUstream_st* stream) {
  CONVBN_LAUNCH(conv_statistics_kernel, tiles_of(p.out_channels, kWarp), dim3(kWarp, kWarp), 0, stream, scratch,
                p.out_channels, pixel_tiles(p), mean, var);
}

}  // namespace convbn
