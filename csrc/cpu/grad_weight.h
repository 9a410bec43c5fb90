// dw of float32, bfloat16 and float64 convolutions: the same bits whatever the number of threads, unlike the library's.
#pragma once
#include "../convolution.h"

namespace convbn {

bool takes_own_grad_weight(const at::Tensor& grad_output, const at::Tensor& input);
// The geometry has no explicit padding; the memory format is any.
at::Tensor own_grad_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                           const ConvGeometry& geometry);

}  // namespace convbn
