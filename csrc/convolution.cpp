#include "convolution.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "convolution_plan.h"
#include "cpu/block_product.h"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;

PaddingMode parse_padding_mode(std::string_view name) {
  if (name == "zeros") return PaddingMode::zeros;
  if (name == "circular") return PaddingMode::circular;
  if (name == "reflect") return PaddingMode::reflect;
  if (name == "replicate") return PaddingMode::replicate;
  TORCH_CHECK_VALUE(false, "conv_bn: padding_mode must be zeros, circular, reflect or replicate, got '", name, "'");
}

const char* name(PaddingMode mode) {
  switch (mode) {
    case PaddingMode::circular:
      return "circular";
    case PaddingMode::reflect:
      return "reflect";
    case PaddingMode::replicate:
      return "replicate";
    default:
      return "zeros";
  }
}

bool ConvGeometry::pads() const {
  return std::any_of(padding.begin(), padding.end(), [](int64_t p) { return p != 0; });
}

bool ConvGeometry::pads_explicitly() const {
  if (mode != PaddingMode::zeros) return pads();
  for (int64_t axis = 0; axis < axes(); ++axis)
    if (padding[2 * axis] != padding[2 * axis + 1]) return true;
  return false;
}

std::vector<int64_t> ConvGeometry::padded_sizes(IntArrayRef input_sizes) const {
  std::vector<int64_t> sizes = input_sizes.vec();
  for (int64_t axis = 0; axis < axes(); ++axis) sizes[axis + 2] += padding[2 * axis] + padding[2 * axis + 1];
  return sizes;
}

std::vector<int64_t> ConvGeometry::output_sizes(IntArrayRef input_sizes, IntArrayRef weight_sizes) const {
  std::vector<int64_t> sizes = padded_sizes(input_sizes);
  sizes[1] = weight_sizes[0];
  for (int64_t axis = 0; axis < axes(); ++axis) {
    const int64_t reach = dilation[axis] * (weight_sizes[axis + 2] - 1) + 1;
    sizes[axis + 2] = sizes[axis + 2] < reach ? 0 : (sizes[axis + 2] - reach) / stride[axis] + 1;
  }
  return sizes;
}

namespace {

// oneDNN has vector code for 16-bit types where the CPU does (bfloat16: AVX-512; float16: its FP16). Elsewhere torch's
// own loops run, which take many times as long as float32 with the conversions.
bool library_has(at::ScalarType type) {
  const auto ask = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op && op->typed<bool()>().call();
  };
  static const bool bfloat16 = ask("mkldnn::_is_mkldnn_bf16_supported");
  static const bool half = ask("mkldnn::_is_mkldnn_fp16_supported");
  return (type == at::kBFloat16 ? bfloat16 : half) && at::globalContext().userEnabledMkldnn();
}

}  // namespace

// oneDNN's 16-bit convolutions return wrong or non-finite numbers for some shapes whose output is one column wide, and
// with three axes for some layers of few channels or with groups (seen in torch 2.13 and 2.14 on an AMX machine).
bool library_needs_float(const Tensor& like, IntArrayRef weight, IntArrayRef output) {
  const bool few = weight.size() == 5 && std::min(weight[0], weight[1]) < 16;
  return like.is_cpu() && at::isReducedFloatingType(like.scalar_type()) &&
         (output.back() == 1 || few || !library_has(like.scalar_type()));
}

namespace {

// Nor has oneDNN vector code for these adjoints: float16's, and bfloat16's of depthwise layers with a stride, a
// dilation or another kernel than 3. Its loops take many times as long as float32 with the conversions.
bool library_is_slow(const Tensor& grad_output, const Tensor& weight, const ConvGeometry& g) {
  if (!grad_output.is_cpu() || !at::isReducedFloatingType(grad_output.scalar_type())) return false;
  const auto all = [](IntArrayRef values, int64_t x) {
    return std::all_of(values.begin(), values.end(), [=](int64_t v) { return v == x; });
  };
  const bool depthwise = g.groups > 1 && weight.size(1) == 1;
  return grad_output.scalar_type() == at::kHalf ||
         (depthwise && !(all(g.stride, 1) && all(g.dilation, 1) && all(weight.sizes().slice(2), 3)));
}

}  // namespace

std::vector<int64_t> library_padding(const ConvGeometry& g) {
  std::vector<int64_t> result(g.axes(), 0);
  if (!g.pads_explicitly())
    for (int64_t axis = 0; axis < g.axes(); ++axis) result[axis] = g.padding[2 * axis];
  return result;
}

// What is left of the geometry when pad() has done its work.
ConvGeometry without_explicit_padding(const ConvGeometry& g) {
  ConvGeometry result = g;
  if (g.pads_explicitly()) result.padding.assign(2 * g.axes(), 0);
  return result;
}

Tensor pad(const Tensor& x, const ConvGeometry& g) {
  std::vector<int64_t> last_axis_first;
  for (int64_t axis = g.axes() - 1; axis >= 0; --axis) {
    last_axis_first.push_back(g.padding[2 * axis]);
    last_axis_first.push_back(g.padding[2 * axis + 1]);
  }
  return at::pad(x, last_axis_first, g.mode == PaddingMode::zeros ? "constant" : name(g.mode));
}

// Axis by axis: what was copied out to the border is added back to where it came from.
Tensor pad_adjoint(const Tensor& grad, IntArrayRef input_sizes, const ConvGeometry& g) {
  Tensor result = grad;
  for (int64_t i = 0; i < g.axes(); ++i) {
    const int64_t lo = g.padding[2 * i], hi = g.padding[2 * i + 1], axis = i + 2, n = input_sizes[axis];
    if (lo == 0 && hi == 0) continue;
    const Tensor before = result.narrow(axis, 0, lo), after = result.narrow(axis, lo + n, hi);
    result = result.narrow(axis, lo, n);
    if (g.mode == PaddingMode::zeros) continue;
    result = result.clone();
    switch (g.mode) {
      case PaddingMode::circular:
        result.narrow(axis, n - lo, lo).add_(before);
        result.narrow(axis, 0, hi).add_(after);
        break;
      case PaddingMode::reflect:
        result.narrow(axis, 1, lo).add_(before.flip(axis));
        result.narrow(axis, n - 1 - hi, hi).add_(after.flip(axis));
        break;
      default:  // replicate
        result.narrow(axis, 0, 1).add_(before.sum(axis, true));
        result.narrow(axis, n - 1, 1).add_(after.sum(axis, true));
    }
  }
  return result;
}

Tensor convolve(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  if (library_needs_float(input, weight.sizes(), g.output_sizes(input.sizes(), weight.sizes())))
    return convolve(input.to(at::kFloat), weight.to(at::kFloat), g).to(input.scalar_type());
  if (g.axes() == 0) return block_product(input, weight.t());
  return planned_convolve(g.pads_explicitly() ? pad(input, g) : input, weight, without_explicit_padding(g));
}

std::tuple<Tensor, Tensor> convolve_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                             const ConvGeometry& g, bool needs_input, bool needs_weight) {
  if (library_needs_float(grad_output, weight.sizes(), grad_output.sizes()) ||
      library_is_slow(grad_output, weight, g)) {
    auto [grad_input, grad_weight] = convolve_backward(grad_output.to(at::kFloat), input.to(at::kFloat),
                                                       weight.to(at::kFloat), g, needs_input, needs_weight);
    const auto dtype = grad_output.scalar_type();
    return {needs_input ? grad_input.to(dtype) : Tensor(), needs_weight ? grad_weight.to(dtype) : Tensor()};
  }
  if (g.axes() == 0)
    return {needs_input ? block_product(grad_output, weight) : Tensor(),
            needs_weight ? block_product(grad_output.t(), input) : Tensor()};
  const bool padded = g.pads_explicitly();
  Tensor x = input;
  if (padded)  // grad_input alone needs the padded input's sizes, not its values
    x = needs_weight ? pad(input, g) : grad_output.new_empty({1}).expand(g.padded_sizes(input.sizes()));
  auto [grad_input, grad_weight] =
      planned_convolve_backward(grad_output, x, weight, without_explicit_padding(g), needs_input, needs_weight);
  if (padded && needs_input) grad_input = pad_adjoint(grad_input, input.sizes(), g);
  return {grad_input, grad_weight};
}

Tensor convolve_adjoint_input(const Tensor& grad_output, const Tensor& weight, IntArrayRef input_sizes,
                              const ConvGeometry& g) {
  const Tensor sizes_only = grad_output.new_empty({1}).expand(input_sizes);
  return std::get<0>(convolve_backward(grad_output, sizes_only, weight, g, true, false));
}

Tensor convolve_adjoint_weight(const Tensor& grad_output, const Tensor& input, IntArrayRef weight_sizes,
                               const ConvGeometry& g) {
  const Tensor sizes_only = grad_output.new_empty({1}).expand(weight_sizes);
  return std::get<1>(convolve_backward(grad_output, input, sizes_only, g, false, true));
}

}  // namespace convbn
