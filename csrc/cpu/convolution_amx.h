// bfloat16 convolutions by AMX tiles, for the layers where the library is slower: the weight's gradient everywhere, the
// convolution and its adjoint on small channels_last images without groups, at stride 1.
#pragma once
#include "../convolution.h"

namespace convbn {

// Whether convolve_amx (like: the input) and grad_input_amx (like: the output's gradient) are for this call.
bool takes_convolve_amx(const at::Tensor& like, const at::Tensor& weight, at::IntArrayRef input_sizes,
                        at::IntArrayRef output_sizes, const ConvGeometry& geometry);
bool takes_grad_weight_amx(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                           const ConvGeometry& geometry);

// All results are channels_last. For dw the arguments may have any memory format.
at::Tensor convolve_amx(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor grad_input_amx(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                          const ConvGeometry& geometry);
at::Tensor grad_weight_amx(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                           const ConvGeometry& geometry);

}  // namespace convbn
