// Convolution in float64 for few channels on a CPU; exact like torch's, only faster. See cpu/stencil_cpu.cpp.
#pragma once
#include "convolution.h"

namespace convbn {

bool stencil_applies(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

// w ⋆ pad(x), where stencil_applies.
at::Tensor stencil_convolve(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
