// Convolution of channels_last images with few channels, in float32.
#pragma once
#include "rows_convolution.h"

namespace convbn {

bool takes_narrow(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

std::unique_ptr<RowsConvolution<float>> make_narrow(at::IntArrayRef input, const at::Tensor& weight,
                                                    const ConvGeometry& geometry);

// dx by itself, channels_last.
bool takes_grad_input_narrow(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                             const ConvGeometry& geometry);
at::Tensor grad_input_narrow(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                             const ConvGeometry& geometry);

}  // namespace convbn
