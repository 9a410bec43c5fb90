// float32 convolutions with a 3 × 3 kernel and stride 1 by Winograd's minimal filtering, 2 × 2 results at a time: 16
// products where the definition has 36 (Winograd, 1980; Lavin & Gray, 2016). channels_last, channels in sixteens.
// Infinite or huge values reach up to one pixel further than by the definition.
#pragma once
#include "../convolution.h"

namespace convbn {

// Whether it can and pays, unless CONVBN_EXT_WINOGRAD=0.
bool suits_winograd(at::IntArrayRef input_sizes, at::IntArrayRef weight_sizes, const ConvGeometry& geometry);
// And `like`, the input or the output's gradient, is what the functions below take.
bool takes_winograd(const at::Tensor& like, at::IntArrayRef input_sizes, at::IntArrayRef weight_sizes,
                    const ConvGeometry& geometry);

// Arguments (the weight in any format) and results are channels_last.
at::Tensor convolve_winograd(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor grad_input_winograd(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                               const ConvGeometry& geometry);
at::Tensor grad_weight_winograd(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                                const ConvGeometry& geometry);

}  // namespace convbn
