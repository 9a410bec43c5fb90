#include "conv_bn.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>

#include "batch_norm.h"

namespace convbn {

using at::Tensor;

Activation parse_activation(std::string_view name) {
  constexpr std::array<std::string_view, kActivations> names{"identity", "relu", "leaky_relu",
                                                             "silu",     "gelu", "hardswish"};
  for (int i = 0; i < kActivations; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  TORCH_CHECK_VALUE(false, "conv_bn: activation must be identity, relu, leaky_relu, silu, gelu or hardswish, got '",
                    name, "'");
}

Memory parse_memory(std::string_view name) {
  if (name == "none") return Memory::none;
  if (name == "save" || name == "chain") return Memory::save;
  if (name == "recompute") return Memory::recompute;
  if (name == "invert") return Memory::invert;
  TORCH_CHECK_VALUE(false, "conv_bn: memory must be save, chain, recompute or invert, got '", name, "'");
}

namespace {

void check_channels(const OptionalTensor& tensor, const char* name, int64_t channels) {
  if (tensor)
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->size(0) == channels, "conv_bn: ", name, " must have shape (",
                      channels, ",), one value per output channel, got ", tensor->sizes());
}

void check_per_axis(at::IntArrayRef values, const char* name, size_t expected, int64_t least) {
  TORCH_CHECK_VALUE(values.size() == expected, "conv_bn: ", name, " needs ", expected, " values here, got ", values);
  for (const int64_t value : values)
    TORCH_CHECK_VALUE(value >= least, "conv_bn: ", name, " must be at least ", least, ", got ", values);
}

void check_padding(const Tensor& input, const ConvGeometry& g) {
  for (int64_t axis = 0; axis < g.axes(); ++axis) {
    const int64_t size = input.size(axis + 2), most = std::max(g.padding[2 * axis], g.padding[2 * axis + 1]);
    if (g.mode == PaddingMode::reflect)
      TORCH_CHECK_VALUE(most < size || most == 0,
                        "conv_bn: reflect padding must be smaller than the input, got padding ", most,
                        " for spatial axis ", axis, " of size ", size);
    if (g.mode == PaddingMode::circular)
      TORCH_CHECK_VALUE(most <= size, "conv_bn: circular padding must not exceed the input, got padding ", most,
                        " for spatial axis ", axis, " of size ", size);
    if (g.mode == PaddingMode::replicate)
      TORCH_CHECK_VALUE(size > 0 || most == 0, "conv_bn: replicate padding needs a non-empty input, spatial axis ",
                        axis, " has size 0");
  }
}

}  // namespace

ConvBnShape ConvBnShape::checked(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                 const OptionalTensor& residual, const OptionalTensor& running_mean,
                                 const OptionalTensor& running_var, const ConvBnOptions& options) {
  const ConvGeometry& g = options.geometry;
  TORCH_CHECK_VALUE(input.dim() >= 2 && input.dim() <= 5,
                    "conv_bn: input must be (N, C) or (N, C, *spatial) with 1 to 3 spatial axes, got shape ",
                    input.sizes());
  TORCH_CHECK_VALUE(weight.dim() == input.dim(), "conv_bn: weight must have as many dimensions as input, got weight ",
                    weight.sizes(), " for input ", input.sizes());
  const auto type = input.scalar_type();
  TORCH_CHECK_VALUE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
                    "conv_bn: input must be float64, float32, bfloat16 or float16, got ", type);
  const size_t axes = input.dim() - 2;
  check_per_axis(g.stride, "stride", axes, 1);
  check_per_axis(g.dilation, "dilation", axes, 1);
  check_per_axis(g.padding, "padding", 2 * axes, 0);
  TORCH_CHECK_VALUE(g.groups >= 1, "conv_bn: groups must be at least 1, got ", g.groups);
  TORCH_CHECK_VALUE(axes > 0 || g.groups == 1, "conv_bn: groups must be 1 for 2-d input (Linear), got ", g.groups);
  TORCH_CHECK_VALUE(weight.size(1) * g.groups == input.size(1), "conv_bn: weight expects ", weight.size(1),
                    "·groups = ", weight.size(1) * g.groups, " input channels, got input with ", input.size(1),
                    " (shape ", input.sizes(), ")");
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(0) % g.groups == 0, "conv_bn: groups = ", g.groups,
                    " must divide the output channels, got weight ", weight.sizes());
  check_padding(input, g);

  ConvBnShape shape;
  shape.channels = weight.size(0);
  shape.output_sizes = g.output_sizes(input.sizes(), weight.sizes());
  shape.count = 1;
  for (size_t axis = 0; axis < shape.output_sizes.size(); ++axis)
    if (axis != 1) shape.count *= shape.output_sizes[axis];
  for (size_t axis = 2; axis < shape.output_sizes.size(); ++axis)
    TORCH_CHECK_VALUE(shape.output_sizes[axis] > 0, "conv_bn: the kernel does not fit into the padded input: input ",
                      input.sizes(), ", weight ", weight.sizes(), ", padding ", at::IntArrayRef(g.padding),
                      ", dilation ", at::IntArrayRef(g.dilation));
  check_channels(bias, "bias", shape.channels);
  check_channels(bn_weight, "bn_weight", shape.channels);
  check_channels(bn_bias, "bn_bias", shape.channels);
  check_channels(running_mean, "running_mean", shape.channels);
  check_channels(running_var, "running_var", shape.channels);
  if (residual)
    TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(shape.output_sizes),
                      "conv_bn: residual must have the output's shape ", shape.output_sizes, ", got ",
                      residual->sizes());
  if (options.training) {
    TORCH_CHECK_VALUE(shape.count > 1, "conv_bn: training needs more than one value per channel, got output shape ",
                      at::IntArrayRef(shape.output_sizes));
  } else {
    TORCH_CHECK_VALUE(running_mean && running_var, "conv_bn: training=False needs running_mean and running_var");
  }
  return shape;
}

std::vector<double> to_vector(const Tensor& t) {
  std::vector<double> result(t.numel());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, t.scalar_type(), "to_vector", [&] {
    const auto* values = t.const_data_ptr<scalar_t>();
    for (size_t c = 0; c < result.size(); ++c) result[c] = static_cast<double>(values[c * t.stride(0)]);
  });
  return result;
}

namespace {

// The vector of f(c), on the CPU: an operator per step would take longer than a small layer.
template <class F>
Tensor channelwise(int64_t channels, F f, at::ScalarType type = at::kDouble) {
  Tensor result = at::empty({channels}, type);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, type, "channelwise", [&] {
    auto* values = result.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<scalar_t>(f(c));
  });
  return result;
}

std::vector<double> vector_or(const OptionalTensor& t, int64_t channels, double otherwise) {
  return t ? to_vector(*t) : std::vector<double>(channels, otherwise);
}

}  // namespace

std::tuple<Tensor, Tensor> frozen_statistics(const Tensor& running_mean, const Tensor& running_var,
                                             const OptionalTensor& bias) {
  if (running_mean.is_cpu()) {
    const int64_t n = running_mean.numel();
    const auto mean = to_vector(running_mean), var = to_vector(running_var), b = vector_or(bias, n, 0);
    return {channelwise(n, [&](int64_t c) { return mean[c] - b[c]; }),
            channelwise(n, [&](int64_t c) { return var[c]; })};
  }
  const Tensor mean = running_mean.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true);
  return {bias ? mean - *bias : mean, running_var.to(at::kDouble, /*non_blocking=*/false, /*copy=*/true)};
}

std::tuple<Tensor, Tensor> bn_affine(const Tensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                     double eps) {
  if (var.is_cpu()) {
    const int64_t n = var.numel();
    const auto variance = to_vector(var), gamma = vector_or(bn_weight, n, 1), beta = vector_or(bn_bias, n, 0);
    return {channelwise(n, [&](int64_t c) { return gamma[c] / std::sqrt(variance[c] + eps); }),
            channelwise(n, [&](int64_t c) { return beta[c]; })};
  }
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("convbn_ext::bn_affine", "").typed<decltype(bn_affine)>();
  return op.call(var, bn_weight, bn_bias, eps);
}

Tensor folded_bias(const BnForward& bn, at::ScalarType type) {
  const auto mean = to_vector(bn.mean), scale = to_vector(bn.scale), beta = to_vector(bn.bias);
  return channelwise(mean.size(), [&](int64_t c) { return beta[c] - scale[c] * mean[c]; }, type);
}

BnParameterGradients bn_parameter_gradients(const Tensor& sum_g, const Tensor& sum_gd, const Tensor& scale,
                                            const Tensor& var, double eps, double count, at::ScalarType weight_type,
                                            at::ScalarType bias_type) {
  if (var.is_cpu()) {
    const auto g = to_vector(sum_g), gd = to_vector(sum_gd), s = to_vector(scale), variance = to_vector(var);
    const int64_t n = var.numel();
    return {channelwise(
                n, [&](int64_t c) { return gd[c] / std::sqrt(variance[c] + eps); }, weight_type),
            channelwise(
                n, [&](int64_t c) { return g[c]; }, bias_type),
            channelwise(n, [&](int64_t c) { return -s[c] * gd[c] / ((variance[c] + eps) * count); }),
            channelwise(n, [&](int64_t c) { return -s[c] * g[c] / count; })};
  }
  using Op = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                        double, double, at::ScalarType, at::ScalarType);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("convbn_ext::bn_parameter_gradients", "").typed<Op>();
  auto [weight, bias, b, c] = op.call(sum_g, sum_gd, scale, var, eps, count, weight_type, bias_type);
  return {weight, bias, b, c};
}

Tensor like_layout(const Tensor& tensor, const Tensor& y) {
  if (tensor.strides() == y.strides()) return tensor;
  return at::empty_like(y).copy_(tensor);
}

Tensor dense(const Tensor& y) {
  const auto format = y.suggest_memory_format();
  return y.contiguous(format);
}

void check_invertible(const ConvBnOptions& options, const Tensor& scale) {
  TORCH_CHECK_VALUE(
      options.activation == Activation::identity || (options.activation == Activation::leaky_relu && options.slope > 0),
      "conv_bn: memory='invert' needs an activation that can be undone, identity or leaky_relu with a positive "
      "slope; use memory='recompute' for the others");
  TORCH_CHECK_VALUE(scale.ne(0).all().item<bool>(),
                    "conv_bn: memory='invert' cannot undo bn_weight = 0; use memory='recompute' for this layer");
}

BnBackward bn_problem(const Tensor& y, const Tensor& mean, const Tensor& scale, const Tensor& bias,
                      const OptionalTensor& residual, std::string_view activation, double slope) {
  TORCH_CHECK_VALUE(y.dim() >= 2, "bn_apply: y must be (N, K, *), got shape ", y.sizes());
  for (const Tensor& v : {mean, scale, bias})
    TORCH_CHECK_VALUE(v.dim() == 1 && v.size(0) == y.size(1) && v.scalar_type() == at::kDouble,
                      "bn_apply: mean, scale and bias must have shape (", y.size(1), ",) and dtype float64, got ",
                      v.sizes(), " in ", v.scalar_type());
  BnBackward bn;
  bn.y = dense(y);
  bn.mean = mean, bn.scale = scale, bn.bias = bias;
  bn.activation = parse_activation(activation);
  bn.slope = slope;
  if (residual) {
    TORCH_CHECK_VALUE(residual->sizes() == y.sizes(), "bn_apply: residual must have y's shape ", y.sizes(), ", got ",
                      residual->sizes());
    bn.residual = like_layout(*residual, bn.y);
  }
  return bn;
}

}  // namespace convbn
