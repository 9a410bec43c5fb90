// Convolution by our own kernels (conv.h) on tensors, with batch normalisation before and behind it.
#pragma once
#include "../conv_bn.h"

namespace convbn {

// Which convolution: CONVBN_EXT_ALGORITHM in the environment says aten, implicit_gemm or auto (the default). What the
// kernels cannot do (float64, three axes) is torch's in any case. auto takes them where they move fewer bytes and bytes
// are what counts: channels_last, 1×1, stride 1, no padding, no groups, whole 16-byte chunks of channels, and
// C·K/(C + K) multiplications per scalar moved few enough that the product hides behind memory.
bool use_implicit_gemm(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

// y in input's memory format; mean and var (float64) of y are taken while it is written, unless null.
at::Tensor implicit_gemm(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry,
                         at::Tensor* mean, at::Tensor* var);

// (dx, dw) from dy = a·g + b·(y − μ) + c, which is never stored; bn's activation is identity, relu or leaky_relu.
std::tuple<at::Tensor, at::Tensor> implicit_gemm_backward(const BnBackward& bn, const at::Tensor& a,
                                                          const at::Tensor& b, const at::Tensor& c,
                                                          const at::Tensor& input, const at::Tensor& weight,
                                                          const ConvGeometry& geometry, bool needs_input,
                                                          bool needs_weight);

}  // namespace convbn
