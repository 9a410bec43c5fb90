// Where the bits of torch's convolutions on a CPU depend on the number of threads: seen on hundreds of random layers
// with one to four threads, on machines with AMX and with AVX2 alone (torch 2.13).
#pragma once
#include "../convolution.h"

namespace convbn {

// Those of y and those of dx, in float32 and float64. The geometry's padding is the library's own; `data` is x or dy,
// in the memory format in which the library would compute.
bool output_depends_on_threads(at::IntArrayRef input_sizes, const at::Tensor& data, const at::Tensor& weight,
                               const ConvGeometry& geometry);
bool grad_input_depends_on_threads(at::IntArrayRef input_sizes, const at::Tensor& weight, const ConvGeometry& geometry);

}  // namespace convbn
