// Normalisation alone, as four operators over a backend's kernels: for statistics that are not those of one process and
// one channel (several processes; groups of channels of one sample). Python puts them together (normalize.py). And the
// output of a layer that keeps y instead of it (memory="chain", conv_bn_autograd.cpp).
//
//   y, residual, grad, out (N, K, *) with one layout; mean, scale, bias, sums, a, b, c (K,) in float64
//   bn_apply            out = act((y − mean)·scale + bias + residual)
//   bn_backward_reduce  Σg, Σg·(y − mean)  with  g = grad·act′
//   bn_backward_apply   grad_y = a·g + b·(y − mean) + c,  grad_residual = g
#pragma once
#include "conv_bn.h"

namespace convbn {

// Checks and the problem that all four share.
BnBackward bn_problem(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& bias,
                      const OptionalTensor& residual, std::string_view activation, double slope);

template <class Kernels>
std::tuple<at::Tensor, at::Tensor> bn_statistics(const at::Tensor& y) {
  TORCH_CHECK_VALUE(y.dim() >= 2 && y.numel() > 0, "bn_statistics: y must be (N, K, *) with values, got shape ",
                    y.sizes());
  return Kernels::statistics(dense(y));
}

using BnApplyOp = at::Tensor(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& scale,
                             const at::Tensor& bias, const OptionalTensor& residual, std::string_view activation,
                             double slope);
template <class Kernels>
at::Tensor bn_apply(const at::Tensor& y, const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& bias,
                    const OptionalTensor& residual, std::string_view activation, double slope) {
  const BnForward bn = bn_problem(y, mean, scale, bias, residual, activation, slope);
  const at::Tensor out = at::empty_like(bn.y);
  if (out.numel() > 0) Kernels::apply(bn, out);
  return out;
}

template <class Kernels>
std::tuple<at::Tensor, at::Tensor> bn_backward_reduce(const at::Tensor& grad, const at::Tensor& y,
                                                      const at::Tensor& mean, const at::Tensor& scale,
                                                      const at::Tensor& bias, const OptionalTensor& residual,
                                                      std::string_view activation, double slope) {
  BnBackward bn = bn_problem(y, mean, scale, bias, residual, activation, slope);
  if (bn.y.numel() == 0) return {at::zeros_like(bn.mean), at::zeros_like(bn.mean)};
  bn.grad = like_layout(grad, bn.y);
  return Kernels::backward_reduce(bn);
}

template <class Kernels>
std::tuple<at::Tensor, at::Tensor> bn_backward_apply(const at::Tensor& grad, const at::Tensor& y,
                                                     const at::Tensor& mean, const at::Tensor& scale,
                                                     const at::Tensor& bias, const OptionalTensor& residual,
                                                     std::string_view activation, double slope, const at::Tensor& a,
                                                     const at::Tensor& b, const at::Tensor& c) {
  BnBackward bn = bn_problem(y, mean, scale, bias, residual, activation, slope);
  bn.grad = like_layout(grad, bn.y);
  const at::Tensor grad_y = at::empty_like(bn.y), grad_residual = at::empty_like(bn.y);
  if (bn.y.numel() > 0) Kernels::backward_apply(bn, a, b, c, grad_y, residual ? grad_residual : at::Tensor());
  return {grad_y, residual ? grad_residual : at::empty({0}, y.options())};
}

}  // namespace convbn
