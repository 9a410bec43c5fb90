// Inference with frozen statistics in one pass over the output: torch's oneDNN convolution with bias, residual and
// activation applied to its accumulators.
#pragma once
#include "../conv_bn.h"

namespace convbn {

// Whether oneDNN can, may and should be used: float32 or bfloat16 images, behind a residual sum only identity and relu
// in channels_last (torch has no kernel for others), not where it is wrong, where a matrix product of contiguous
// tensors is faster, and where the output is larger than the weight: folding is a pass over the weight, and what it
// saves is one over the output.
bool fuses(const at::Tensor& input, const at::Tensor& weight, bool residual, const ConvBnOptions& options);

// act(weight ⋆ input + bias + residual).
at::Tensor fused_convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                             const OptionalTensor& residual, const ConvBnOptions& options);

}  // namespace convbn
