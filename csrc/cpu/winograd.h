// float32 convolutions with a 3 × 3 kernel and stride 1 by Winograd's minimal filtering (Winograd, 1980; Lavin & Gray,
// 2016): 16 products for 2 × 2 results where the definition has 36, or 36 for 4 × 4 where it has 144. channels_last,
// channels in sixteens. What is not finite reaches results of the same tile that the definition keeps from it.
#pragma once
#include "../convolution.h"

namespace convbn {

// Whether it can and pays, unless CONVBN_EXT_WINOGRAD=0. large: tiles of 4 × 4 may be used.
bool suits_winograd(at::IntArrayRef input_sizes, at::IntArrayRef weight_sizes, const ConvGeometry& geometry,
                    bool large);

// Arguments (the weight in any format) and results are float32 on the CPU, channels_last; dw in the format wanted.
at::Tensor convolve_winograd(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry,
                             bool large);
at::Tensor grad_input_winograd(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                               const ConvGeometry& geometry, bool large);
at::Tensor grad_weight_winograd(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                                const ConvGeometry& geometry, at::MemoryFormat format);

}  // namespace convbn
