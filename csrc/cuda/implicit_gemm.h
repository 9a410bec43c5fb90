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

// The backward pass, of bn with its tensors as images in channels_last, no residual, and the activation identity, relu
// or leaky_relu; dy = a·g + b·(y − μ) + c is never stored.
void as_products_take(BnBackward& bn);
// Σg, Σg·(y − μ) and, in one pass over y, grad and input, the products that dw is made of when a, b and c are known.
std::tuple<at::Tensor, at::Tensor, at::Tensor> implicit_gemm_reduce(const BnBackward& bn, const at::Tensor& input,
                                                                    const at::Tensor& weight,
                                                                    const ConvGeometry& geometry);
// (dx, dw): dx if needs_input, dw if there are products.
std::tuple<at::Tensor, at::Tensor> implicit_gemm_backward(const BnBackward& bn, const at::Tensor& a,
                                                          const at::Tensor& b, const at::Tensor& c,
                                                          const at::Tensor& input, const at::Tensor& weight,
                                                          const ConvGeometry& geometry, const at::Tensor& products,
                                                          bool needs_input);

}  // namespace convbn
