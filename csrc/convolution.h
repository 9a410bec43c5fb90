// Convolution as a linear map with all four paddings, and its exact adjoints.
//   y = w ⋆ pad(x):  x (N, C_in, *spatial), w (C_out, C_in/groups, *kernel), y (N, C_out, *out); no spatial axis =
//   Linear
// What torch lacks (padding adjoints, asymmetric padding, shapes where it is wrong) is here; whose arithmetic it is,
// ours or torch's, convolution_plan.h decides.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "padding.h"

namespace convbn {

PaddingMode parse_padding_mode(std::string_view name);
const char* name(PaddingMode mode);

struct ConvGeometry {
  std::vector<int64_t> stride;    // per spatial axis
  std::vector<int64_t> padding;   // (lo, hi) per spatial axis, first spatial axis first
  std::vector<int64_t> dilation;  // per spatial axis
  int64_t groups = 1;
  PaddingMode mode = PaddingMode::zeros;

  int64_t axes() const { return static_cast<int64_t>(stride.size()); }
  bool pads() const;             // any padding at all
  bool pads_explicitly() const;  // padding that torch's convolution cannot do itself
  std::vector<int64_t> padded_sizes(at::IntArrayRef input_sizes) const;
  std::vector<int64_t> output_sizes(at::IntArrayRef input_sizes, at::IntArrayRef weight_sizes) const;
};

// The linear map D W of images flattened in the order (C, *spatial): a convolution and then a row scaling, if any.
struct Convolution {
  at::Tensor weight;
  ConvGeometry geometry;
  std::vector<int64_t> spatial;         // of the input
  std::optional<at::Tensor> row_scale;  // (m,)
};

at::Tensor pad(const at::Tensor& x, const ConvGeometry& geometry);
at::Tensor pad_adjoint(const at::Tensor& grad, at::IntArrayRef input_sizes, const ConvGeometry& geometry);

// Whether a convolution in a 16-bit type on the CPU must be computed in float32: torch's is wrong there, or has no
// vector code for this machine.
bool library_needs_float(const at::Tensor& like, at::IntArrayRef weight_sizes, at::IntArrayRef output_sizes);
// The padding that is left to the library: one number per axis, zero when pad() has done the work.
std::vector<int64_t> library_padding(const ConvGeometry& geometry);

at::Tensor convolve(const at::Tensor& input, const at::Tensor& weight, const ConvGeometry& geometry);
at::Tensor convolve_adjoint_input(const at::Tensor& grad_output, const at::Tensor& weight, at::IntArrayRef input_sizes,
                                  const ConvGeometry& geometry);
at::Tensor convolve_adjoint_weight(const at::Tensor& grad_output, const at::Tensor& input, at::IntArrayRef weight_sizes,
                                   const ConvGeometry& geometry);

// Both adjoints in one call; what is not needed comes back undefined.
std::tuple<at::Tensor, at::Tensor> convolve_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, const ConvGeometry& geometry,
                                                     bool needs_input, bool needs_weight);

}  // namespace convbn
