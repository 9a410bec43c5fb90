// y and dx of float32 and float64 convolutions by matrix products on gathered pixels, for any layer: the same bits
// whatever the number of threads.
#pragma once
#include "../convolution.h"

namespace convbn {

// The geometry has no explicit padding; the memory format is any, and that of the results is torch's.
at::Tensor convolve_gathered(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor grad_input_gathered(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                               const ConvGeometry& geometry);

}  // namespace convbn
