// Convolution with stride 1 in float64 for few channels, where torch's way (im2col and one small GEMM per sample)
// spends its time on copies. With the padding written out, every tap is an offset, whatever the number of axes:
//   y[b, c, p] = Σ_t w[c, t] · x[b, group(c), p + at(t)],  t over (C_in/groups, *kernel)
// A thread owns whole (sample, output channel) planes; a plane is computed row by row, see stencil.inl.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../stencil.h"
#include "isa.h"

#define CONVBN_LOOPS "stencil.inl"
#include "each_isa.inl"

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kMostTaps = 96;  // beyond, a GEMM has enough to do for each element that im2col copies

// offsets[i] + k · step, 0 ≤ k < count, k fastest
std::vector<int64_t> all_sums(const std::vector<int64_t>& offsets, int64_t count, int64_t step) {
  std::vector<int64_t> result;
  for (const int64_t offset : offsets)
    for (int64_t k = 0; k < count; ++k) result.push_back(offset + k * step);
  return result;
}

}  // namespace

bool stencil_applies(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  const bool stride1 = std::all_of(g.stride.begin(), g.stride.end(), [](int64_t s) { return s == 1; });
  return input.is_cpu() && input.scalar_type() == at::kDouble && g.axes() > 0 && stride1 &&
         weight[0].numel() <= kMostTaps;
}

Tensor stencil_convolve(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  static const auto row = best_of(&baseline::stencil_row, &avx2::stencil_row, &avx512::stencil_row);
  const Tensor x = (g.pads() ? pad(input, g) : input).contiguous(), w = weight.contiguous();
  const Tensor y = at::empty(g.output_sizes(input.sizes(), weight.sizes()), x.options());
  const int64_t axes = g.axes(), batch = y.size(0), C = y.size(1), taps = w[0].numel();
  if (y.numel() == 0) return y;

  // offsets of the taps and of the rows from the first element that a plane reads
  std::vector<int64_t> offsets = {0}, rows = {0};
  for (int64_t axis = 1; axis < axes + 2; ++axis) {
    const int64_t dilation = axis == 1 ? 1 : g.dilation[axis - 2];
    offsets = all_sums(offsets, w.size(axis), dilation * x.stride(axis));
    if (axis > 1 && axis < axes + 1) rows = all_sums(rows, y.size(axis), x.stride(axis));
  }
  const int64_t height = static_cast<int64_t>(rows.size()), width = y.size(-1), group = w.size(1) * x.stride(1);
  const double *in = x.const_data_ptr<double>(), *factor = w.const_data_ptr<double>();
  double* out = y.mutable_data_ptr<double>();
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, height * width * taps));
  at::parallel_for(0, batch * C, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / C, c = plane % C;
      const double* from = in + b * x.stride(0) + c / (C / g.groups) * group;
      for (int64_t r = 0; r < height; ++r)
        row(from + rows[r], offsets.data(), factor + c * taps, taps, out + (plane * height + r) * width, width);
    }
  });
  return y;
}

}  // namespace convbn
