// Launchers of the convolution's gradient by its input, and of the table that makes dy.
#include "conv_launch.cuh"

namespace convbn {

namespace {

// table[i][c], i = mean, scale, bias, a, b, c: rounded as bn_backward_apply rounds them.
__global__ void conv_table_kernel(BnProblem p, const double* a, const double* b, const double* c, float* table) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x, channels = static_cast<int>(p.channels);
  if (channel >= channels) return;
  const BackwardAffine<float> bn(p, a, b, c, channel);
  const float rows[] = {bn.mean, bn.scale, bn.bias, bn.a, bn.b, bn.c};
  for (int i = 0; i < NormGradient<float>::kRows; ++i) table[int64_t{i} * channels + channel] = rows[i];
}

}  // namespace

int64_t conv_table_size(const ConvProblem& p) { return int64_t{NormGradient<float>::kRows} * p.out_channels; }

void launch_conv_table(const BnProblem& bn, const double* a, const double* b, const double* c, float* table,
                       CUstream_st* stream) {
  CONVBN_LAUNCH(conv_table_kernel, tiles_of(bn.channels, kThreads), kThreads, 0, stream, bn, a, b, c, table);
}

void launch_conv_grad_input(const ConvProblem& p, const BnProblem& bn, const float* table, const void* weight, void* dx,
                            CUstream_st* stream) {
  with_float_scalar(p.scalar, [&]<typename scalar_t>(scalar_t) {
    const int chunk = chunk_size<scalar_t>(p, {bn.y, bn.grad, bn.out, table, weight, dx});
    launch_product<scalar_t>(p, gather_adjoint(p), norm_gradient<scalar_t>(bn, table), p.channels, chunk, weight, dx,
                             nullptr, stream);
  });
}

}  // namespace convbn
