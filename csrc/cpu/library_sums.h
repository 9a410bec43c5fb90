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

// What the library gets in the place of x, or of dy, and of the geometry's padding. It cuts rows into pieces by the
// number of threads, and in pieces shorter than their padding it takes the taps in another order. Zeros are therefore
// part of the data, c columns on either side, where they are more than one or than half a kernel's:
//   y = w ⋆ x padded by p = w ⋆ (0, x, 0) with c = p;  with stride 1, dx of dy by p is dx of (0, dy, 0) by p + c
// In channels_last and with more than one this is also faster, 1.05 to 1.3 times in six of seven layers.
struct Padded {
  at::Tensor data;
  std::vector<int64_t> padding;
};
Padded padded_input(const at::Tensor& x, const at::Tensor& weight, const ConvGeometry& geometry);
Padded padded_grad_output(const at::Tensor& grad_output, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
