// Autocast for callers of the operator itself: input, weight and residual go to autocast's dtype, vectors per channel
// stay as they are.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "conv_bn.h"

namespace convbn {

namespace {

using at::Tensor;

template <c10::DeviceType device>
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_forward_autocast(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, std::string_view memory, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view padding_mode, double eps,
    std::string_view activation, double slope) {
  const c10::impl::ExcludeDispatchKeyGuard guard(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [&](const auto& t) { return at::autocast::cached_cast(dtype, t, device); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("convbn_ext::conv_bn_forward", "").typed<ConvBnForwardOp>();
  return op.call(cast(input), cast(weight), bias, bn_weight, bn_bias, cast(residual), running_mean, running_var,
                 training, memory, stride, padding, dilation, groups, padding_mode, eps, activation, slope);
}

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, AutocastCPU, m) {
  m.impl("conv_bn_forward", TORCH_FN(conv_bn_forward_autocast<c10::DeviceType::CPU>));
}
TORCH_LIBRARY_IMPL(convbn_ext, AutocastCUDA, m) {
  m.impl("conv_bn_forward", TORCH_FN(conv_bn_forward_autocast<c10::DeviceType::CUDA>));
}

}  // namespace convbn
