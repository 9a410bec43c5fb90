// The fastest way to a convolution and its adjoints; on other devices than the CPU, torch's own.
#pragma once
#include "convolution.h"

namespace convbn {

// The geometry has no explicit padding (without_explicit_padding).
at::Tensor planned_convolve(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);
std::tuple<at::Tensor, at::Tensor> planned_convolve_backward(const at::Tensor& grad_output, const at::Tensor& x,
                                                             const at::Tensor& weight, const ConvGeometry& geometry,
                                                             bool needs_input, bool needs_weight);

// Whether planned_convolve and a pass over its result take less time than the library's convolution with that pass
// built in, or the latter's bits depend on the number of threads.
bool beats_fused_inference(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);
// Whether the library's convolution of contiguous tensors takes less time by way of channels_last, where that is one
// pass over its result, or has bits that depend on the number of threads without.
bool turns_to_channels_last(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
