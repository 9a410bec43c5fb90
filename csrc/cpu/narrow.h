// Convolution of channels_last images with few channels, in float32.
#pragma once
#include "rows_convolution.h"

namespace convbn {

bool takes_narrow(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

std::unique_ptr<RowsConvolution<float>> make_narrow(at::IntArrayRef input, const at::Tensor& weight,
                                                    const ConvGeometry& geometry);

}  // namespace convbn
