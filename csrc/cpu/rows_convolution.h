// Convolutions of our own between channels_last images, row by row, inside the passes of batch normalisation: the
// statistics of y are taken, and dy is used, while rows of them are in the L2 cache; dy is never stored whole.
//
//   forward   a block of rows of y at a time, and its statistics
//   backward  a band of rows of dy at a time, with the rows beside it that its rows of dx need, in a buffer; from there
//             the band's rows of dx, and the band's part of dw. Parts are added in order: threads change no bit.
//
// This is the driver (rows_convolution.cpp). What convolves is a RowsConvolution. A new kind has a takes_…() and a
// make_…(), and a line each in own_rows_convolution() and rows_convolution().
#pragma once
#include <memory>

#include "../conv_bn.h"
#include "bn_loops.h"

namespace convbn {

// Rows of (H, W, C) images with all channels of a pixel side by side. Methods run on several threads at once.
template <typename scalar_t>
struct RowsConvolution {
  using acc = acc_t<scalar_t>;
  virtual ~RowsConvolution() = default;
  // Rows [first, last) of one image's y; x is the whole image, y begins with row `first`.
  virtual void forward(const scalar_t* x, int64_t first, int64_t last, scalar_t* y) const = 0;
  // Rows [first, last) of one image's dx, which dx begins with; dy begins with row dy_first and has all rows that meet
  // them.
  virtual void grad_input(const scalar_t* dy, int64_t dy_first, int64_t first, int64_t last, scalar_t* dx) const = 0;
  // Adds the products of rows [first, last) of one image's dy, which dy begins with, to as many sums as the weight has
  // elements, in any order.
  virtual void grad_weight(const scalar_t* x, const scalar_t* dy, int64_t first, int64_t last, acc* sums) const = 0;
  // Those sums, (weight.numel(),) in float64, as dw in float64.
  virtual at::Tensor grad_weight_of(const at::Tensor& sums) const = 0;
};

// Whether there is one, and it is faster than the library.
bool own_rows_convolution(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);

// y = w ⋆ x, and its statistics unless mean is null.
at::Tensor convolve_rows(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry,
                         at::Tensor* mean, at::Tensor* var);

// dx and dw of dy = a·g + b·(y − μ) + c, undefined where not needed; fills grad_residual if it is defined.
std::tuple<at::Tensor, at::Tensor> convolve_rows_backward(const BnBackward& bn, const at::Tensor& a,
                                                          const at::Tensor& b, const at::Tensor& c,
                                                          const at::Tensor& input, const at::Tensor& weight,
                                                          const ConvGeometry& geometry, bool needs_input,
                                                          bool needs_weight, const at::Tensor& grad_residual);

}  // namespace convbn
