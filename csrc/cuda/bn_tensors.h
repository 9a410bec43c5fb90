// Tensors to pointers for the launchers of bn.h and conv.h: device guard, current stream, problem.
#pragma once
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../conv_bn.h"
#include "bn.h"

namespace convbn {

inline Scalar scalar_of(const at::Tensor& y) {
  switch (y.scalar_type()) {
    case at::kDouble:
      return Scalar::f64;
    case at::kFloat:
      return Scalar::f32;
    case at::kHalf:
      return Scalar::f16;
    case at::kBFloat16:
      return Scalar::bf16;
    default:
      TORCH_CHECK_TYPE(false, "conv_bn: no CUDA kernel for ", y.scalar_type());
  }
}

inline const void* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_data(const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// A problem on y's device and current stream. The per-channel vectors live as long as this does.
struct Launch {
  c10::cuda::CUDAGuard guard;
  CUstream_st* stream;
  BnProblem problem;
  at::Tensor mean, scale, bias;

  explicit Launch(at::Device device) : guard(device), stream(at::cuda::getCurrentCUDAStream()) {}
  explicit Launch(const at::Tensor& y) : Launch(y.device()) {
    problem.scalar = scalar_of(y);
    const int64_t samples = y.size(0), channels = y.size(1), values = y.numel() / std::max<int64_t>(1, channels);
    problem.channels_last = values == samples || channels == 1 || !y.is_contiguous();
    problem.channels = channels;
    problem.outer = problem.channels_last ? values : samples;
    problem.inner = problem.channels_last ? 1 : values / std::max<int64_t>(1, samples);
  }
  explicit Launch(const BnForward& bn, const at::Tensor& y) : Launch(y) {
    mean = bn.mean.to(at::kDouble).contiguous();
    scale = bn.scale.to(at::kDouble).contiguous();
    bias = bn.bias.to(at::kDouble).contiguous();
    problem.activation = bn.activation;
    problem.slope = bn.slope;
    problem.residual = data(bn.residual);
    problem.mean = mean.const_data_ptr<double>();
    problem.scale = scale.const_data_ptr<double>();
    problem.bias = bias.const_data_ptr<double>();
  }
  explicit Launch(const BnBackward& bn) : Launch(static_cast<const BnForward&>(bn), bn.y) {
    problem.y = data(bn.y);
    problem.grad = data(bn.grad);
    problem.out = data(bn.out);
  }

  at::Tensor vector(const at::Tensor& like, int64_t size) const {
    return at::empty({size}, like.options().dtype(at::kDouble));
  }
};

}  // namespace convbn
