// Depthwise convolution of channels_last images, every channel by itself.
#pragma once
#include "rows_convolution.h"

namespace convbn {

bool takes_depthwise(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

template <typename scalar_t>
std::unique_ptr<RowsConvolution<scalar_t>> make_depthwise(at::IntArrayRef input, const at::Tensor& weight,
                                                          const ConvGeometry& geometry);

// dw alone, float32 and bfloat16, of a given dy; contiguous tensors are copied.
bool takes_grad_weight_depthwise(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight,
                                 const ConvGeometry& geometry);
at::Tensor grad_weight_depthwise(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                                 const ConvGeometry& geometry);

}  // namespace convbn
