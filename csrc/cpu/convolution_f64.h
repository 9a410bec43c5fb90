// float64 convolutions of channels_last images by matrix products on gathered pixels: the same
// bits whatever the number of threads.
#pragma once
#include "../convolution.h"

namespace convbn {

// x or w is channels_last, and so will be the results.
bool takes_convolve_f64(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor convolve_f64(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor grad_input_f64(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                          const ConvGeometry& geometry);

}  // namespace convbn
