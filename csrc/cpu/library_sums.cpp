#include "library_sums.h"

#include <algorithm>

#include "memory_format.h"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kSmallImage = 20480;  // values (of a column, in 3-d), up to which torch does not call oneDNN

struct Layer {
  int64_t to, from;  // channels of a group
  bool grouped, one, strided, dilated;

  Layer(IntArrayRef input, const Tensor& weight, const ConvGeometry& g)
      : to(weight.size(0) / g.groups), from(weight.size(1)), grouped(g.groups > 1), one(input[0] == 1) {
    const auto other = [](IntArrayRef values) {
      return std::any_of(values.begin(), values.end(), [](int64_t v) { return v != 1; });
    };
    strided = other(g.stride), dilated = other(g.dilation);
  }
  bool whole(int64_t block) const { return to % block == 0 && from % block == 0; }
  bool depthwise() const { return grouped && to == 1 && from == 1; }
};

// What oneDNN goes by: the CPU itself, not torch's choice (isa.h).
bool has_avx512() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512f");
  return has;
#else
  return false;
#endif
}

enum class Sums { fixed, depend, unknown };

// What y and dx share: torch's own algorithm for float64 and for a small image by itself, and in oneDNN one axis, and
// padding that reaches beyond the kernel.
Sums of_either(const Layer& layer, IntArrayRef input, const Tensor& weight, const ConvGeometry& g) {
  const auto type = weight.scalar_type();
  if (!weight.is_cpu() || (type != at::kFloat && type != at::kDouble) || weight.numel() == 0) return Sums::fixed;
  if (type == at::kDouble) return Sums::depend;
  if (layer.depthwise()) return Sums::fixed;
  if (g.axes() == 1) return Sums::depend;
  const auto padding = library_padding(g);
  for (int64_t i = 0; i < g.axes(); ++i)
    if (padding[i] > (weight.size(i + 2) - 1) * g.dilation[i]) return Sums::depend;
  const bool small = !layer.grouped && layer.one && c10::multiply_integers(input.slice(0, 4)) <= kSmallImage;
  return small ? Sums::depend : Sums::unknown;
}

// By how many columns the kernel reaches beyond its first.
int64_t reach(const Tensor& weight, const ConvGeometry& g) { return (weight.sizes().back() - 1) * g.dilation.back(); }

// Whether so many columns of padding on either side of the data must be part of it.
bool writes_zeros(int64_t columns, const Tensor& data, const Tensor& weight, const ConvGeometry& g) {
  const bool many = columns > 1 || 2 * columns > reach(weight, g);
  return many && data.is_cpu() && data.numel() > 0 && !Layer(data.sizes(), weight, g).depthwise();
}

Tensor with_zeros(const Tensor& t, int64_t columns) { return at::constant_pad_nd(t, {columns, columns}); }

}  // namespace

// Contiguous images are computed in blocks of 8 channels; for those of 1 or 3 oneDNN has kernels.
bool output_depends_on_threads(IntArrayRef input, const Tensor& data, const Tensor& weight, const ConvGeometry& g) {
  if (c10::multiply_integers(input) == 0) return false;
  const Layer layer(input, weight, g);
  const Sums either = of_either(layer, input, weight, g);
  if (either != Sums::unknown) return either == Sums::depend;
  const bool first = (layer.from == 1 || layer.from == 3) && layer.to % 16 == 0;
  // Two axes with groups come in channels_last, unless that cannot be told from contiguous.
  const bool pixel = data.is_contiguous() && data.is_contiguous(last_format(g.axes()));
  const bool blocks = layer.grouped ? g.axes() == 3 || pixel : g.axes() == 2 && !first;
  return blocks && !layer.whole(8) && data.suggest_memory_format() == at::MemoryFormat::Contiguous;
}

bool grad_input_depends_on_threads(IntArrayRef input, const Tensor& weight, const ConvGeometry& g) {
  if (c10::multiply_integers(input) == 0) return false;
  const Layer layer(input, weight, g);
  const Sums either = of_either(layer, input, weight, g);
  if (either != Sums::unknown) return either == Sums::depend;
  if (layer.dilated) return true;
  const bool blocks = layer.whole(16);
  if (layer.one) return layer.strided || layer.grouped || !blocks;
  return layer.strided && !(blocks && has_avx512());
}

Padded padded_input(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  auto padding = library_padding(g);
  const int64_t columns = padding.back();
  if (!writes_zeros(columns, x, weight, g)) return {x, padding};
  padding.back() = 0;
  return {with_zeros(x, columns), padding};
}

Padded padded_grad_output(const Tensor& grad_output, const Tensor& weight, const ConvGeometry& g) {
  auto padding = library_padding(g);
  const int64_t columns = reach(weight, g) - padding.back();
  if (g.stride.back() != 1 || !writes_zeros(columns, grad_output, weight, g)) return {grad_output, padding};
  padding.back() += columns;
  return {with_zeros(grad_output, columns), padding};
}

}  // namespace convbn
