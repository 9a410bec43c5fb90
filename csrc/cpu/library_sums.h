// Where the bits of torch's convolutions on a CPU depend on the number of threads: seen on hundreds of random layers
// with one to four threads on machines with AMX, with up to 48 on one with AVX2 alone (torch 2.13).
#pragma once
#include "../convolution.h"

namespace convbn {

// Those of y and those of dx, in float32 and float64. The geometry's padding is the library's own; `data` is x or dy,
// in the memory format in which the library would compute.
bool output_depends_on_threads(at::IntArrayRef input_sizes, const at::Tensor& data, const at::Tensor& weight,
                               const ConvGeometry& geometry);
bool grad_input_depends_on_threads(at::IntArrayRef input_sizes, const at::Tensor& weight, const ConvGeometry& geometry);

// What the library gets in the place of x, or of dy, and of the geometry's padding. Its bits were seen to depend on the
// number of threads, by which it cuts rows into pieces, where it pads by more than one column or than half a kernel's.
// These c columns of zeros on either side are therefore part of the data:
//   y = w ⋆ x padded by p = w ⋆ (0, x, 0) with c = p;  with stride 1, dx and dw of dy by p are those of (0, dy, 0) by
//   p + c
struct Padded {
  at::Tensor data;
  std::vector<int64_t> padding;
};
Padded padded_input(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);
Padded padded_grad_output(const at::Tensor& grad_output, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
