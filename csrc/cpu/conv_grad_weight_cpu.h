// The weight's gradient of a bfloat16 convolution, faster than the library's where AMX is there.
#pragma once
#include "../convolution.h"

namespace convbn {

// Whether grad_weight_amx is for this call: stride 1, no groups, channels_last, enough channels.
bool takes_grad_weight_amx(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                           const ConvGeometry& geometry);

// dw (C_out, C_in, *kernel), channels_last: dw[o, t, i] = Σ over positions p of dy[p, o]·x[p + t, i]
at::Tensor grad_weight_amx(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                           const ConvGeometry& geometry);

}  // namespace convbn
