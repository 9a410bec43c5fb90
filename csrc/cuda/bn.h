// Batch normalisation on CUDA as the torch side sees it. Neither torch nor CUDA headers: a stream is an opaque pointer.
//
//   statistics       μ, σ² (biased) per channel
//   apply            out = act((y − μ)·scale + bias + residual)
//   backward_reduce  Σg, Σg·(y − μ)  with  g = grad·act′(v),  v = out where given, else the argument of act in apply
//   backward_apply   grad_y = a·g + b·(y − μ) + c,  grad_residual = g
//   invert           y = (act⁻¹(out) − residual − bias)/scale + μ, for identity and leaky_relu
//
// Tensors are dense and share one layout: (M, C) with the channel fastest (channels_last), or (N, C, S) with the plane
// fastest (contiguous). Per-channel vectors are (C,) in float64. Sums are taken in an order that depends on the shape
// alone, so results do not change from run to run or from device to device.
#pragma once
#include <cstdint>

#include "../activation.h"

struct CUstream_st;

namespace convbn {

enum class Scalar : int { f64, f32, f16, bf16 };

struct BnProblem {
  Scalar scalar = Scalar::f32;
  bool channels_last = false;
  int64_t outer = 0, channels = 0, inner = 0;  // (M, C, 1) or (N, C, S)
  Activation activation = Activation::identity;
  double slope = 0;
  const void *y = nullptr, *residual = nullptr, *grad = nullptr, *out = nullptr;  // null where there is none
  const double *mean = nullptr, *scale = nullptr, *bias = nullptr;
};

// Doubles that statistics and backward_reduce need as scratch.
int64_t bn_scratch_size(const BnProblem& problem);

void launch_bn_statistics(const BnProblem& problem, double* scratch, double* mean, double* var, CUstream_st* stream);
void launch_bn_apply(const BnProblem& problem, void* out, CUstream_st* stream);
void launch_bn_backward_reduce(const BnProblem& problem, double* scratch, double* sum_g, double* sum_gd,
                               CUstream_st* stream);
void launch_bn_backward_apply(const BnProblem& problem, const double* a, const double* b, const double* c, void* grad_y,
                              void* grad_residual, CUstream_st* stream);
void launch_bn_invert(const BnProblem& problem, void* y, CUstream_st* stream);

// What is computed per channel (bn_channels.cu). A vector (C,) of any type; without data it is not wanted, or its
// default.
struct ChannelVector {
  const void* data = nullptr;
  Scalar scalar = Scalar::f32;
};
struct MutableChannelVector {
  void* data = nullptr;
  Scalar scalar = Scalar::f32;
};

void launch_bn_affine(int channels, const double* var, ChannelVector weight, ChannelVector bias, double eps,
                      double* scale, double* shift, CUstream_st* stream);
void launch_bn_parameter_gradients(int channels, const double* sum_g, const double* sum_gd, const double* scale,
                                   const double* var, double eps, double count, MutableChannelVector grad_weight,
                                   MutableChannelVector grad_bias, double* b, double* c, CUstream_st* stream);
void launch_bn_move_running(int channels, const double* mean, const double* var, double unbiased, ChannelVector bias,
                            double momentum, MutableChannelVector running_mean, MutableChannelVector running_var,
                            int64_t* batches, CUstream_st* stream);

}  // namespace convbn
