// Launchers of the convolution's gradient by its input, and of the table that makes dy.
#include "conv_launch.cuh"

namespace convbn {

namespace {

// table[i][c], i = mean, scale, bias, a, b, c: rounded as bn_backward_apply rounds them. Without a, instead of it
// mean(g) of a few pixels, all over the images (0 for halves, where MaskedGradient does not use it).
constexpr int kGuessPixels = 32;

template <typename scalar_t>
__global__ void conv_table_kernel(BnProblem p, MaskedGradient<scalar_t> gradient, const double* a, const double* b,
                                  const double* c, float* table) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x, channels = static_cast<int>(p.channels);
  if (channel >= channels) return;
  const Affine<float> bn(p, channel);
  const auto put = [=](int i, float x) { table[int64_t{i} * channels + channel] = x; };
  put(0, bn.mean);
  put(1, bn.scale);
  put(2, bn.bias);
  if (a) {
    const BackwardAffine<float> backward(p, a, b, c, channel);
    put(3, backward.a);
    put(4, backward.b);
    put(5, backward.c);
    return;
  }
  float sum = 0;
  if constexpr (std::is_same_v<scalar_t, float>) {
    const int64_t step = (p.outer + kGuessPixels - 1) / kGuessPixels;
    for (int64_t pixel = 0; pixel < p.outer; pixel += step) {
      float g[1], d[1];
      gradient.template parts<1>(gradient.template load<1>(pixel * channels + channel), channel, g, d);
      sum += g[0];
    }
    sum /= (p.outer + step - 1) / step;
  }
  put(3, sum);
}

}  // namespace

int64_t conv_table_size(const ConvProblem& p) { return int64_t{NormGradient<float>::kRows} * p.out_channels; }

void launch_conv_table(const BnProblem& bn, const double* a, const double* b, const double* c, float* table,
                       CUstream_st* stream) {
  with_float_scalar(bn.scalar, [&]<typename scalar_t>(scalar_t) {
    CONVBN_LAUNCH(conv_table_kernel<scalar_t>, tiles_of(bn.channels, kThreads), kThreads, 0, stream, bn,
                  masked_gradient<scalar_t>(bn, table), a, b, c, table);
  });
}

void launch_conv_grad_input(const ConvProblem& p, const BnProblem& bn, const float* table, const void* weight, void* dx,
                            CUstream_st* stream) {
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    const int chunk = chunk_size<scalar_t>(p, {bn.y, bn.grad, bn.out, table, weight, dx});
    launch_product<scalar_t>(p, gather_adjoint(p), NormGradient<scalar_t>{masked_gradient<scalar_t>(bn, table)},
                             p.channels, chunk, weight, dx, nullptr, stream);
  });
}

}  // namespace convbn
