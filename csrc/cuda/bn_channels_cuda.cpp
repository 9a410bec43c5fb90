// The torch side of bn_channels.cu.
#include <torch/library.h>

#include "../batch_norm.h"
#include "bn_tensors.h"

namespace convbn {

namespace {

using at::Tensor;

// A vector of the launch: contiguous, or not given.
ChannelVector vector_of(const OptionalTensor& t) {
  return t ? ChannelVector{t->const_data_ptr(), scalar_of(*t)} : ChannelVector{};
}
MutableChannelVector mutable_vector_of(const OptionalTensor& t) {
  return t ? MutableChannelVector{t->mutable_data_ptr(), scalar_of(*t)} : MutableChannelVector{};
}
OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

std::tuple<Tensor, Tensor> bn_affine_cuda(const Tensor& var, const OptionalTensor& bn_weight,
                                          const OptionalTensor& bn_bias, double eps) {
  const Launch launch(var.device());
  const Tensor v = var.contiguous(), scale = at::empty_like(v), shift = at::empty_like(v);
  const OptionalTensor weight = contiguous(bn_weight), bias = contiguous(bn_bias);
  launch_bn_affine(static_cast<int>(v.numel()), v.const_data_ptr<double>(), vector_of(weight), vector_of(bias), eps,
                   scale.mutable_data_ptr<double>(), shift.mutable_data_ptr<double>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_parameter_gradients_cuda(const Tensor& sum_g, const Tensor& sum_gd,
                                                                       const Tensor& scale, const Tensor& var,
                                                                       double eps, double count,
                                                                       at::ScalarType weight_type,
                                                                       at::ScalarType bias_type) {
  const Launch launch(var.device());
  const Tensor g = sum_g.contiguous(), gd = sum_gd.contiguous(), s = scale.contiguous(), v = var.contiguous();
  const Tensor grad_weight = at::empty_like(v, weight_type), grad_bias = at::empty_like(v, bias_type),
               b = at::empty_like(v), c = at::empty_like(v);
  launch_bn_parameter_gradients(static_cast<int>(v.numel()), g.const_data_ptr<double>(), gd.const_data_ptr<double>(),
                                s.const_data_ptr<double>(), v.const_data_ptr<double>(), eps, count,
                                mutable_vector_of(grad_weight), mutable_vector_of(grad_bias),
                                b.mutable_data_ptr<double>(), c.mutable_data_ptr<double>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_weight, grad_bias, b, c};
}

void bn_move_running_cuda(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, const Tensor& mean, const Tensor& var,
                          const OptionalTensor& bias, double unbiased, double momentum) {
  const Launch launch(mean.device());
  const Tensor m = mean.contiguous(), v = var.contiguous();
  const OptionalTensor shift = contiguous(bias);
  launch_bn_move_running(static_cast<int>(m.numel()), m.const_data_ptr<double>(), v.const_data_ptr<double>(), unbiased,
                         vector_of(shift), momentum, mutable_vector_of(running_mean), mutable_vector_of(running_var),
                         num_batches_tracked ? num_batches_tracked->mutable_data_ptr<int64_t>() : nullptr,
                         launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CUDA, m) {
  m.impl("bn_affine", &bn_affine_cuda);
  m.impl("bn_parameter_gradients", &bn_parameter_gradients_cuda);
  m.impl("bn_move_running", &bn_move_running_cuda);
}

}  // namespace convbn
