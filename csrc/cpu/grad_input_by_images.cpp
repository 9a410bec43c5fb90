#include "grad_input_by_images.h"

#include <algorithm>

#include "bn_blocks.h"
#include "memory_format.h"
#include "one_thread.h"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kUnits = 16;  // of work, if there are so many images

}  // namespace

bool suits_grad_input_by_images(const Tensor& weight, IntArrayRef input_sizes, const ConvGeometry& g) {
  const int64_t narrow = std::min(weight.size(0) / g.groups, weight.size(1));
  return weight.scalar_type() == at::kFloat && g.axes() == 2 && g.groups > 1 && narrow <= 8 &&
         weight.size(2) * weight.size(3) > 1 && input_sizes[0] > 1;
}

Tensor grad_input_by_images(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes,
                            const ConvGeometry& g) {
  const bool last = grad_output.suggest_memory_format() != at::MemoryFormat::Contiguous ||
                    weight.suggest_memory_format() != at::MemoryFormat::Contiguous;
  const auto format = last ? last_format(g.axes()) : at::MemoryFormat::Contiguous;
  const Tensor dy = to_format(grad_output, format), w = to_format(weight, format);
  const Tensor dx = at::empty(input_sizes, dy.options().memory_format(format));
  const int64_t images = dx.size(0), some = pieces(images, kUnits), units = pieces(images, some);
  const std::vector<int64_t> zero(g.axes(), 0), padding = library_padding(g);
  each_by_one_thread(units, [&](int64_t unit) {
    const int64_t first = unit * some, count = std::min(some, images - first);
    const Tensor here = dx.narrow(0, first, count);  // of the input the library wants sizes and strides
    here.copy_(std::get<0>(at::convolution_backward(dy.narrow(0, first, count), here, w, at::OptionalIntArrayRef(),
                                                    g.stride, padding, g.dilation, /*transposed=*/false, zero, g.groups,
                                                    {true, false, false})));
  });
  return dx;
}

}  // namespace convbn
