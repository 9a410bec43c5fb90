#include "inference.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "../convolution_plan.h"
#include "library_sums.h"
#include "memory_format.h"
#include "pool.h"

namespace convbn {

namespace {

using at::IntArrayRef;
using at::Tensor;
using Scalars = c10::List<std::optional<at::Scalar>>;
using Text = std::optional<std::string_view>;

// Schemas of torch's own operators for fused inference; they are registered where torch was built with oneDNN.
using Pointwise = Tensor(const Tensor& X, const Tensor& W, const OptionalTensor& B, IntArrayRef padding,
                         IntArrayRef stride, IntArrayRef dilation, int64_t groups, std::string_view attr,
                         Scalars scalars, Text algorithm);
using PointwiseBinary = Tensor(const Tensor& X, const Tensor& other, const Tensor& W, const OptionalTensor& B,
                               IntArrayRef padding, IntArrayRef stride, IntArrayRef dilation, int64_t groups,
                               std::string_view binary_attr, std::optional<at::Scalar> alpha, Text unary_attr,
                               Scalars unary_scalars, Text unary_algorithm);

template <class Op>
std::optional<c10::TypedOperatorHandle<Op>> find(const char* overload) {
  const auto schema = c10::Dispatcher::singleton().findSchema({"mkldnn::_convolution_pointwise", overload});
  if (!schema || !schema->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
  return schema->typed<Op>();
}

const char* onednn_name(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return "relu";
    case Activation::leaky_relu:
      return "leaky_relu";
    case Activation::silu:
      return "swish";
    case Activation::gelu:
      return "gelu";
    case Activation::hardswish:
      return "hardswish";
    default:
      return "none";
  }
}

const auto& plain() {
  static const auto op = find<Pointwise>("");
  return op;
}
const auto& with_sum() {
  static const auto op = find<PointwiseBinary>("binary");
  return op;
}

}  // namespace

bool fuses(const Tensor& input, const Tensor& weight, bool residual, const ConvBnOptions& options) {
  const auto type = input.scalar_type();
  const bool given_contiguous = input.suggest_memory_format() == at::MemoryFormat::Contiguous;
  if (residual &&
      (given_contiguous || (options.activation != Activation::identity && options.activation != Activation::relu)))
    return false;
  const auto output_sizes = options.geometry.output_sizes(input.sizes(), weight.sizes());
  return weight.numel() < c10::multiply_integers(output_sizes) && plain() && with_sum() &&
         at::globalContext().userEnabledMkldnn() && input.dim() >= 4 && input.numel() > 0 &&
         (type == at::kFloat || type == at::kBFloat16) && !library_needs_float(input, weight.sizes(), output_sizes) &&
         !beats_fused_inference(input, weight, options.geometry);
}

Tensor fused_convolution(const Tensor& input, const Tensor& weight, const Tensor& bias, const OptionalTensor& residual,
                         const ConvBnOptions& options) {
  const ConvGeometry& g = options.geometry;
  // What the library makes beside the result is for itself.
  const int64_t bytes = input.element_size() * c10::multiply_integers(g.output_sizes(input.sizes(), weight.sizes()));
  const PoolPause pause(bytes < kPooledBytes && static_cast<int64_t>(input.nbytes()) < kMallocKeeps);
  const bool turns = turns_to_channels_last(input, weight, g);
  Tensor x = g.pads_explicitly() ? pad(input, g) : input, w = weight;
  if (turns) x = to_format(x, at::MemoryFormat::ChannelsLast), w = to_format(w, at::MemoryFormat::ChannelsLast);
  const auto [data, padding] = padded_input(x, w, g);
  Scalars scalars;
  if (options.activation == Activation::leaky_relu) scalars.push_back(at::Scalar(options.slope));
  const Text algorithm = options.activation == Activation::gelu ? Text("none") : Text("");
  const char* activation = onednn_name(options.activation);
  if (!residual) {
    const Tensor out =
        plain()->call(data, w, bias, padding, g.stride, g.dilation, g.groups, activation, scalars, algorithm);
    return turns ? to_format(out, at::MemoryFormat::Contiguous) : out;
  }
  const Text unary = options.activation == Activation::identity ? std::nullopt : Text(activation);
  return with_sum()->call(data, *residual, weight, bias, padding, g.stride, g.dilation, g.groups, "add", std::nullopt,
                          unary, scalars, algorithm);
}

}  // namespace convbn
