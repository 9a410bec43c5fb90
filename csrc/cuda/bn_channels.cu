// What a layer computes per channel, one launch each: a tensor operation per step would take longer than a small layer.
//
//   affine               s = γ/√(σ² + ε),  β
//   parameter_gradients  dγ = Σg·d/√(σ² + ε),  dβ = Σg,  b = −s·Σg·d/((σ² + ε)·m),  c = −s·Σg/m
//   move_running         running ← running + momentum·(batch − running), one batch more
#include "bn_layout.cuh"

namespace convbn {

namespace {

__device__ __forceinline__ double at(const ChannelVector& v, int c, double otherwise) {
  if (!v.data) return otherwise;
  double value = 0;
  with_scalar(v.scalar, [&]<typename scalar_t>(scalar_t) { value = to_acc(static_cast<const scalar_t*>(v.data)[c]); });
  return value;
}

__device__ __forceinline__ void put(const MutableChannelVector& v, int c, double value) {
  if (!v.data) return;
  with_scalar(v.scalar, [&]<typename scalar_t>(scalar_t) {
    static_cast<scalar_t*>(v.data)[c] = from_acc<scalar_t>(static_cast<acc_t<scalar_t>>(value));
  });
}

__global__ void bn_affine_kernel(int channels, const double* __restrict__ var, ChannelVector weight, ChannelVector bias,
                                 double eps, double* __restrict__ scale, double* __restrict__ shift) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  scale[c] = at(weight, c, 1) / std::sqrt(var[c] + eps);
  shift[c] = at(bias, c, 0);
}

__global__ void bn_parameter_gradients_kernel(int channels, const double* __restrict__ sum_g,
                                              const double* __restrict__ sum_gd, const double* __restrict__ scale,
                                              const double* __restrict__ var, double eps, double count,
                                              MutableChannelVector grad_weight, MutableChannelVector grad_bias,
                                              double* __restrict__ b, double* __restrict__ c) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= channels) return;
  const double g = sum_g[i], gd = sum_gd[i], s = scale[i], v = var[i] + eps;
  put(grad_weight, i, gd / std::sqrt(v));
  put(grad_bias, i, g);
  b[i] = -s * gd / (v * count);
  c[i] = -s * g / count;
}

__global__ void bn_move_running_kernel(int channels, const double* __restrict__ mean, const double* __restrict__ var,
                                       double unbiased, ChannelVector bias, double momentum,
                                       MutableChannelVector running_mean, MutableChannelVector running_var,
                                       int64_t* batches) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c == 0 && batches) ++*batches;
  if (c >= channels) return;
  const auto move = [&](const MutableChannelVector& running, double now) {
    const double old = at({running.data, running.scalar}, c, 0);
    put(running, c, old + momentum * (now - old));
  };
  move(running_mean, mean[c] + at(bias, c, 0));
  move(running_var, unbiased * var[c]);
}

dim3 channel_grid(int channels) { return dim3(std::max<int64_t>(1, ceil_div(channels, kThreads))); }

}  // namespace

void launch_bn_affine(int channels, const double* var, ChannelVector weight, ChannelVector bias, double eps,
                      double* scale, double* shift, CUstream_st* stream) {
  CONVBN_LAUNCH(bn_affine_kernel, channel_grid(channels), kThreads, 0, stream, channels, var, weight, bias, eps, scale,
                shift);
}

void launch_bn_parameter_gradients(int channels, const double* sum_g, const double* sum_gd, const double* scale,
                                   const double* var, double eps, double count, MutableChannelVector grad_weight,
                                   MutableChannelVector grad_bias, double* b, double* c, CUstream_st* stream) {
  CONVBN_LAUNCH(bn_parameter_gradients_kernel, channel_grid(channels), kThreads, 0, stream, channels, sum_g, sum_gd,
                scale, var, eps, count, grad_weight, grad_bias, b, c);
}

void launch_bn_move_running(int channels, const double* mean, const double* var, double unbiased, ChannelVector bias,
                            double momentum, MutableChannelVector running_mean, MutableChannelVector running_var,
                            int64_t* batches, CUstream_st* stream) {
  CONVBN_LAUNCH(bn_move_running_kernel, channel_grid(channels), kThreads, 0, stream, channels, mean, var, unbiased,
                bias, momentum, running_mean, running_var, batches);
}

}  // namespace convbn
