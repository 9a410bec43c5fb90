// dw of float32 and float64 convolutions by matrix products within images whose channels lie side by side: the same
// bits whatever the number of threads, unlike the library's.
#pragma once
#include "../convolution.h"

namespace convbn {

// One group.
bool takes_grad_weight_by_pixels(const at::Tensor& grad_output, const at::Tensor& input, const ConvGeometry& geometry);
// The geometry has no explicit padding; dw has the channels of a tap side by side.
at::Tensor grad_weight_by_pixels(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                                 const ConvGeometry& geometry);

}  // namespace convbn
