// 2-d convolution as an implicit matrix product, with batch normalisation on both sides of it. Neither torch nor CUDA
// headers, like bn.h.
//
//   forward       y = w ⋆ x, and per channel the statistics of y where they are asked for
//   grad_input    dx = the adjoint of w ⋆ applied to dy
//   grad_weight   dw = Σ over pixels of dy · im2col(x), and the sums that b and c are made of
// dy = a·g + b·(y − μ) + c with g = grad·act′(v) is computed while y and grad are loaded, and never stored: see bn.h,
// for identity, relu and leaky_relu (BnProblem's residual must be null; the others apply g first, bn_backward_apply).
//
// Layouts: x (N, H, W, C), y (N, P, Q, K), channels last. Weights (K, R, S, C/G); for grad_input transposed within each
// group, (G, C/G, R, S, K/G); depthwise (C = K = G) all three (R, S, C). grad_weight gives (K, R, S, C/G).
// All sums are taken in an order that depends on the shape alone.
#pragma once
#include "../padding.h"
#include "bn.h"

namespace convbn {

struct ConvProblem {
  Scalar scalar = Scalar::f32;  // not f64
  bool tensor_cores = false;    // float products in tf32; half types always use them
  int64_t samples = 0;
  int channels = 0, out_channels = 0, groups = 1;
  int size[2] = {1, 1}, out_size[2] = {1, 1};                                             // (H, W), (P, Q)
  int kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};  // padding at the low end
  PaddingMode border = PaddingMode::zeros;

  bool depthwise() const { return groups == channels && groups == out_channels && groups > 1; }
};

int64_t conv_statistics_size(const ConvProblem& problem);  // doubles of scratch
void launch_conv_forward(const ConvProblem& problem, const void* x, const void* weight, void* y, double* scratch,
                         CUstream_st* stream);  // scratch null: no statistics
void launch_conv_statistics(const ConvProblem& problem, const double* scratch, double* mean, double* var,
                            CUstream_st* stream);

// What dy is made of: bn's y, grad, out, mean, scale, bias and a, b, c (or a null), as floats: table has
// conv_table_size of them.
int64_t conv_table_size(const ConvProblem& problem);
void launch_conv_table(const BnProblem& bn, const double* a, const double* b, const double* c, float* table,
                       CUstream_st* stream);

// PaddingMode::zeros alone: with other borders, of a problem over the padded input with padding 0, then folded.
void launch_conv_grad_input(const ConvProblem& problem, const BnProblem& bn, const float* table, const void* weight,
                            void* dx, CUstream_st* stream);

// The one pass over y, grad and x that needs none of a, b, c: Σg and Σg·(y − μ), as launch_bn_backward_reduce gives
// them, and in scratch what dw is made of when a, b and c are known. Of the table the first three rows.
int64_t conv_grad_weight_size(const ConvProblem& problem);  // doubles of scratch
void launch_conv_grad_weight(const ConvProblem& problem, const BnProblem& bn, const float* table, const void* x,
                             double* scratch, double* sum_g, double* sum_gd, CUstream_st* stream);
void launch_conv_combine_weight(const ConvProblem& problem, const BnProblem& bn, const double* a, const double* b,
                                const double* c, double* scratch, void* dw, CUstream_st* stream);

}  // namespace convbn
