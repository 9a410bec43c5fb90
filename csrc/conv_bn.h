// out = act(BN(w ⋆ x) + residual), forward and backward, written once for all backends.
//
//   y = w ⋆ x;  per channel over all m = N·∏spatial values: μ = mean(y), σ² = mean((y − μ)²);  s = γ/√(σ² + ε)
//   out = act((y − μ)·s + β + residual)
//   g = grad·act′;  dβ = Σg,  dγ = Σg·(y − μ)/√(σ² + ε);  dy = s·(g − dβ/m − x̂·dγ/m);  dx, dw = adjoints of ⋆
// With frozen statistics (eval) dy = s·g. The convolution's own bias shifts y and μ alike: it cancels in training and
// moves μ to running_mean − bias in eval, so it is never added to y.
//
// A backend is a struct of five static kernels over y (see `Kernels` below); conv_bn_cpu.cpp and conv_bn_cuda.cpp each
// instantiate the two operators with theirs and register them.
#pragma once
#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "activation.h"
#include "convolution.h"

namespace convbn {

using OptionalTensor = std::optional<at::Tensor>;

Activation parse_activation(std::string_view name);
enum class Memory { none, save, recompute, invert };  // none: there will be no backward pass
Memory parse_memory(std::string_view name);

// Everything about a call that is not a tensor.
struct ConvBnOptions {
  ConvGeometry geometry;
  Activation activation = Activation::identity;
  double slope = 0;
  double eps = 0;
  bool training = false;
};

// Argument checks and output sizes, once for all backends; throws ValueError naming the argument.
struct ConvBnShape {
  std::vector<int64_t> output_sizes;
  int64_t channels = 0;
  int64_t count = 0;  // values per channel

  static ConvBnShape checked(const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                             const OptionalTensor& residual, const OptionalTensor& running_mean,
                             const OptionalTensor& running_var, const ConvBnOptions& options);
};

// What the kernels see: y (N, C, *) in either memory format, per-channel vectors (C,) in float64.
// residual, out, grad and grad_y have y's strides.
struct BnForward {
  at::Tensor y, residual;  // residual may be undefined
  at::Tensor mean, scale, bias;
  Activation activation = Activation::identity;
  double slope = 0;
};
struct BnBackward : BnForward {
  at::Tensor grad;
  at::Tensor out;  // if defined, the activation's sign is read from it, and residual is not needed
};
// A backend:
// struct Kernels {
//   static std::tuple<Tensor, Tensor> statistics(const Tensor& y);                        // μ, σ² (biased), float64
//   static void apply(const BnForward&, const Tensor& out);                               // out may be y
//   static std::tuple<Tensor, Tensor> backward_reduce(const BnBackward&);                 // Σg, Σg·(y − μ), float64
//   static void backward_apply(const BnBackward&, const Tensor& a, const Tensor& b, const Tensor& c,
//                              const Tensor& grad_y, const Tensor& grad_residual);        // dy = a·g + b·(y − μ) + c
//                              // grad_y may be y
//   static Tensor invert(const BnForward&, const Tensor& out);                            // y from out
//   // only where there is something better than convolution and apply; an undefined result: not for this call
//   static Tensor infer(input, weight, const BnForward&, residual, options);  // act((s·w) ⋆ x + (β − s·μ) + residual)
// };
// A backend may also have a convolution of its own, for the layers that it accepts; dy is never stored whole there:
//   static bool own_convolution(const Tensor& input, const Tensor& weight, const ConvGeometry&);
//   static Tensor convolve(input, weight, geometry, Tensor* mean, Tensor* var);                  // null: not asked for
//   static std::tuple<Tensor, Tensor> convolve_backward(const BnBackward&, a, b, c, input, weight, geometry,  // dx, dw
//                                                       needs_input, needs_weight, const Tensor& grad_residual);
// or, where the sums of the backward pass come with the products that dw is made of:
//   static Tensor prepare_products(BnBackward&, bool needs_residual);   // to what the next two take; grad_residual
//   // Σg, Σg·(y − μ) in one pass over y, grad and x, and what dw is made of once b and c are known
//   static std::tuple<Tensor, Tensor, Tensor> backward_reduce_products(const BnBackward&, input, weight, geometry);
//   // dx, and dw where there are products
//   static std::tuple<Tensor, Tensor> backward_convolve(const BnBackward&, a, b, c, input, weight, geometry, products,
//                                                       needs_input);
template <class Kernels>
concept HasConvolution = requires { &Kernels::own_convolution; };
template <class Kernels>
concept HasProducts = requires { &Kernels::backward_reduce_products; };

// μ and σ² of running statistics; the bias moves μ.
std::tuple<at::Tensor, at::Tensor> frozen_statistics(const at::Tensor& running_mean, const at::Tensor& running_var,
                                                     const OptionalTensor& bias);
// s = γ/√(σ² + ε) and β, in float64
std::tuple<at::Tensor, at::Tensor> bn_affine(const at::Tensor& var, const OptionalTensor& bn_weight,
                                             const OptionalTensor& bn_bias, double eps);
at::Tensor folded_bias(const BnForward& bn, at::ScalarType type);  // β − s·μ, on the CPU
// dγ, dβ and the coefficients of dy = s·g + b·(y − μ) + c with batch statistics over `count` values.
struct BnParameterGradients {
  at::Tensor weight, bias, b, c;
};
BnParameterGradients bn_parameter_gradients(const at::Tensor& sum_g, const at::Tensor& sum_gd, const at::Tensor& scale,
                                            const at::Tensor& var, double eps, double count, at::ScalarType weight_type,
                                            at::ScalarType bias_type);
std::vector<double> to_vector(const at::Tensor& t);                     // (C,) of any floating type, on the CPU
at::Tensor like_layout(const at::Tensor& tensor, const at::Tensor& y);  // tensor with y's strides
at::Tensor dense(const at::Tensor& y);                                  // y, contiguous or channels_last
void check_invertible(const ConvBnOptions& options, const at::Tensor& scale);

// The operators as the dispatcher calls them.
using ConvBnForwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, std::string_view memory, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view padding_mode, double eps,
    std::string_view activation, double slope);
using ConvBnBackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& y,
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const OptionalTensor& residual, const OptionalTensor& out, bool training, std::string_view memory,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::string_view padding_mode, double eps, std::string_view activation, double slope,
    std::array<bool, 5> output_mask);

using UpdateRunningStatisticsOp = void(const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                       const OptionalTensor& num_batches_tracked, const at::Tensor& mean,
                                       const at::Tensor& var, const OptionalTensor& bias, c10::SymInt count,
                                       double momentum);

// y = w ⋆ x, dense, and its statistics unless mean is null.
template <class Kernels>
at::Tensor convolve_by(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry,
                       at::Tensor* mean = nullptr, at::Tensor* var = nullptr) {
  if constexpr (HasConvolution<Kernels>) {
    if (Kernels::own_convolution(input, weight, geometry)) return Kernels::convolve(input, weight, geometry, mean, var);
  }
  const at::Tensor y = dense(convolve(input, weight, geometry));
  if (mean) std::tie(*mean, *var) = Kernels::statistics(y);
  return y;
}

// Returns (out, y, mean, var). memory says what the backward pass will start from; y is empty unless it is "save".
// With "none" and frozen statistics these may be folded into the weights:  (w ⋆ x − μ)·s + β = (s·w) ⋆ x + (β − s·μ)
template <class Kernels>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_bn_forward(
    const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& bn_weight,
    const OptionalTensor& bn_bias, const OptionalTensor& residual, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, bool training, std::string_view memory, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::string_view padding_mode, double eps,
    std::string_view activation, double slope) {
  const ConvBnOptions options{{stride.vec(), padding.vec(), dilation.vec(), groups, parse_padding_mode(padding_mode)},
                              parse_activation(activation),
                              slope,
                              eps,
                              training};
  ConvBnShape::checked(input, weight, bias, bn_weight, bn_bias, residual, running_mean, running_var, options);

  const Memory keep = parse_memory(memory);
  const bool save_y = keep == Memory::save;
  BnForward bn;
  bn.activation = options.activation;
  bn.slope = slope;
  at::Tensor mean, var;
  if (training) {
    bn.y = convolve_by<Kernels>(input, weight, options.geometry, &mean, &var);
  } else {
    std::tie(mean, var) = frozen_statistics(*running_mean, *running_var, bias);
  }
  bn.mean = mean;
  std::tie(bn.scale, bn.bias) = bn_affine(var, bn_weight, bn_bias, eps);
  if (keep == Memory::invert) check_invertible(options, bn.scale);
  if (!training) {
    if constexpr (requires { Kernels::infer(input, weight, bn, residual, options); })
      if (keep == Memory::none)
        if (const at::Tensor out = Kernels::infer(input, weight, bn, residual, options); out.defined())
          return {out, at::empty({0}, input.options()), mean, var};
    bn.y = convolve_by<Kernels>(input, weight, options.geometry);
  }
  if (residual) bn.residual = like_layout(*residual, bn.y);
  const at::Tensor out = save_y ? at::empty_like(bn.y) : bn.y;
  if (out.numel() > 0) Kernels::apply(bn, out);
  return {out, save_y ? bn.y : at::empty({0}, input.options()), mean, var};
}

// Returns the gradients of (input, weight, bn_weight, bn_bias, residual); those not in output_mask are empty.
// memory says where y comes from: save (given), recompute (convolve again), invert (from out).
// With overwrite_y, dy takes the place of a given y, which is lost (conv_bn_backward_).
template <class Kernels, bool overwrite_y = false>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> conv_bn_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight, const OptionalTensor& y,
    const at::Tensor& mean, const at::Tensor& var, const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
    const OptionalTensor& residual, const OptionalTensor& out, bool training, std::string_view memory,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
    std::string_view padding_mode, double eps, std::string_view activation, double slope,
    std::array<bool, 5> output_mask) {
  const ConvBnOptions options{{stride.vec(), padding.vec(), dilation.vec(), groups, parse_padding_mode(padding_mode)},
                              parse_activation(activation),
                              slope,
                              eps,
                              training};
  const auto [needs_input, needs_weight, needs_bn_weight, needs_bn_bias, needs_residual] = output_mask;
  BnBackward bn;
  bn.activation = options.activation;
  bn.slope = slope;
  bn.mean = mean;
  std::tie(bn.scale, bn.bias) = bn_affine(var, bn_weight, bn_bias, eps);
  switch (parse_memory(memory)) {
    case Memory::none:
      TORCH_CHECK_VALUE(false, "conv_bn_backward: memory must be save, chain, recompute or invert, got 'none'");
    case Memory::save:
      bn.y = *y;
      break;
    case Memory::recompute:
      bn.y = convolve_by<Kernels>(input, weight, options.geometry);
      break;
    case Memory::invert:
      check_invertible(options, bn.scale);
      if (residual) bn.residual = like_layout(*residual, *out);
      bn.y = Kernels::invert(bn, *out);
  }
  if (residual) bn.residual = like_layout(*residual, bn.y);
  if (out) bn.out = like_layout(*out, bn.y);
  bn.grad = like_layout(grad_output, bn.y);

  const at::Tensor none = at::empty({0}, input.options());
  at::Tensor grad_input = none, grad_weight = none, grad_bn_weight = none, grad_bn_bias = none, grad_residual = none;
  const bool needs_convolution = needs_input || needs_weight;
  bool own = false, own_weight = false;  // convolution: any of its gradients, that of the weight
  if constexpr (HasConvolution<Kernels>) {
    own = needs_convolution && Kernels::own_convolution(input, weight, options.geometry);
    if constexpr (HasProducts<Kernels>) {
      own_weight = own && needs_weight;
      if (own) {
        const at::Tensor g = Kernels::prepare_products(bn, needs_residual);
        if (g.defined()) grad_residual = g;
      }
    } else {
      own = own && bn.y.is_contiguous(at::MemoryFormat::ChannelsLast);
    }
  }
  at::Tensor products;
  BnParameterGradients parameters;
  if (needs_bn_weight || needs_bn_bias || (training && needs_convolution) || own_weight) {
    at::Tensor sum_g, sum_gd;
    if constexpr (HasProducts<Kernels>) {
      if (own_weight)
        std::tie(sum_g, sum_gd, products) = Kernels::backward_reduce_products(bn, input, weight, options.geometry);
    }
    if (!own_weight) std::tie(sum_g, sum_gd) = Kernels::backward_reduce(bn);
    const auto wide = at::toOpMathType(input.scalar_type());
    // dy = s·g − (s/m)·(Σg + (y − μ)·invstd²·Σg(y − μ))
    parameters =
        bn_parameter_gradients(sum_g, sum_gd, bn.scale, var, eps, static_cast<double>(bn.y.numel()) / mean.numel(),
                               bn_weight ? bn_weight->scalar_type() : wide, bn_bias ? bn_bias->scalar_type() : wide);
    if (needs_bn_weight) grad_bn_weight = parameters.weight;
    if (needs_bn_bias) grad_bn_bias = parameters.bias;
  }
  if (needs_convolution || needs_residual) {
    at::Tensor &b = parameters.b, &c = parameters.c;
    if (!training || !b.defined()) b = c = at::zeros_like(mean);
    if constexpr (HasConvolution<Kernels>) {
      if (own) {
        at::Tensor dx, dw;
        if constexpr (HasProducts<Kernels>) {
          std::tie(dx, dw) =
              Kernels::backward_convolve(bn, bn.scale, b, c, input, weight, options.geometry, products, needs_input);
        } else {
          if (needs_residual) grad_residual = at::empty_like(bn.y);
          std::tie(dx, dw) =
              Kernels::convolve_backward(bn, bn.scale, b, c, input, weight, options.geometry, needs_input, needs_weight,
                                         needs_residual ? grad_residual : at::Tensor());
        }
        return {needs_input ? dx : none, needs_weight ? dw : none, grad_bn_weight, grad_bn_bias, grad_residual};
      }
    }
    const at::Tensor grad_y = bn.y.is_same(y.value_or(at::Tensor())) && !overwrite_y ? at::empty_like(bn.y) : bn.y;
    if (needs_residual) grad_residual = at::empty_like(bn.y);
    Kernels::backward_apply(bn, bn.scale, b, c, grad_y, needs_residual ? grad_residual : at::Tensor());
    if (needs_convolution) {
      auto [dx, dw] = convolve_backward(grad_y, input, weight, options.geometry, needs_input, needs_weight);
      if (needs_input) grad_input = dx;
      if (needs_weight) grad_weight = dw;
    }
  }
  return {grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_residual};
}

}  // namespace convbn
