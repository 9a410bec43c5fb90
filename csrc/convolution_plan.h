// The fastest way to a convolution and its adjoints; on other devices than the CPU, torch's own.
#pragma once
#include "convolution.h"

namespace convbn {

// The geometry has no explicit padding (without_explicit_padding).
at::Tensor planned_convolve(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);
std::tuple<at::Tensor, at::Tensor> planned_convolve_backward(const at::Tensor& grad_output, const at::Tensor& x,
                                                             const at::Tensor& weight, const ConvGeometry& geometry,
                                                             bool needs_input, bool needs_weight);

// Whether planned_convolve is a matrix product here.
bool convolves_by_product(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
