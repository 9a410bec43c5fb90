// The torch side of batch normalisation on CUDA: tensors to pointers, device and stream, launch checks. The convolution
// is torch's.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../conv_bn.h"
#include "bn.h"

namespace convbn {

namespace {

using at::Tensor;

Scalar scalar_of(const Tensor& y) {
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

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// A problem on y's device and current stream. The per-channel vectors live as long as this does.
struct Launch {
  c10::cuda::CUDAGuard guard;
  CUstream_st* stream;
  BnProblem problem;
  Tensor mean, scale, bias;

  explicit Launch(const Tensor& y) : guard(y.device()), stream(at::cuda::getCurrentCUDAStream()) {
    problem.scalar = scalar_of(y);
    const int64_t samples = y.size(0), channels = y.size(1), values = y.numel() / std::max<int64_t>(1, channels);
    problem.channels_last = values == samples || channels == 1 || !y.is_contiguous();
    problem.channels = channels;
    problem.outer = problem.channels_last ? values : samples;
    problem.inner = problem.channels_last ? 1 : values / std::max<int64_t>(1, samples);
  }
  explicit Launch(const BnForward& bn, const Tensor& y) : Launch(y) {
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

  Tensor vector(const Tensor& like, int64_t size) const { return at::empty({size}, like.options().dtype(at::kDouble)); }
};

struct CudaKernels {
  static std::tuple<Tensor, Tensor> statistics(const Tensor& y) {
    Launch launch(y);
    launch.problem.y = data(y);
    const Tensor scratch = launch.vector(y, bn_scratch_size(launch.problem));
    const Tensor mean = launch.vector(y, y.size(1)), var = launch.vector(y, y.size(1));
    launch_bn_statistics(launch.problem, scratch.mutable_data_ptr<double>(), mean.mutable_data_ptr<double>(),
                         var.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {mean, var};
  }

  static void apply(const BnForward& bn, const Tensor& out) {
    Launch launch(bn, bn.y);
    launch.problem.y = data(bn.y);
    launch_bn_apply(launch.problem, mutable_data(out), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static std::tuple<Tensor, Tensor> backward_reduce(const BnBackward& bn) {
    if (bn.y.numel() == 0) return {at::zeros_like(bn.mean), at::zeros_like(bn.mean)};
    Launch launch(bn);
    const Tensor scratch = launch.vector(bn.y, bn_scratch_size(launch.problem));
    const Tensor sum_g = launch.vector(bn.y, bn.y.size(1)), sum_gd = launch.vector(bn.y, bn.y.size(1));
    launch_bn_backward_reduce(launch.problem, scratch.mutable_data_ptr<double>(), sum_g.mutable_data_ptr<double>(),
                              sum_gd.mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {sum_g, sum_gd};
  }

  static void backward_apply(const BnBackward& bn, const Tensor& a, const Tensor& b, const Tensor& c,
                             const Tensor& grad_y, const Tensor& grad_residual) {
    if (bn.y.numel() == 0) return;
    Launch launch(bn);
    const Tensor a_ = a.contiguous(), b_ = b.contiguous(), c_ = c.contiguous();
    launch_bn_backward_apply(launch.problem, a_.const_data_ptr<double>(), b_.const_data_ptr<double>(),
                             c_.const_data_ptr<double>(), mutable_data(grad_y), mutable_data(grad_residual),
                             launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static Tensor invert(const BnForward& bn, const Tensor& out) {
    const Tensor y = at::empty_like(out);
    if (out.numel() == 0) return y;
    Launch launch(bn, out);
    launch.problem.out = data(out);
    launch_bn_invert(launch.problem, mutable_data(y), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return y;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) {
  m.impl("conv_bn_forward", &conv_bn_forward<CudaKernels>);
  m.impl("conv_bn_backward", &conv_bn_backward<CudaKernels>);
}

}  // namespace convbn
