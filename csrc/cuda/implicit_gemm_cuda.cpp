#include <ATen/Context.h>

#include <array>
#include <cstdlib>
#include <limits>

#include "bn_tensors.h"
#include "conv.h"
#include "implicit_gemm.h"

namespace convbn {

namespace {

using at::Tensor;

constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

// 0 and 1 spatial axes as 2: (N, C) → (N, C, 1, 1), (N, C, L) → (N, C, 1, L).
Tensor as_image(Tensor t) {
  while (t.dim() < 4) t = t.unsqueeze(2);
  return t;
}
Tensor nhwc(const Tensor& t) { return as_image(t).contiguous(kChannelsLast); }

// Back to the axes and the memory format of `like`.
Tensor in_format_of(const Tensor& image, const Tensor& like, at::IntArrayRef sizes) {
  return image.contiguous(like.dim() == 4 ? like.suggest_memory_format() : at::MemoryFormat::Contiguous).view(sizes);
}

ConvProblem problem_of(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  ConvProblem p;
  const auto& context = at::globalContext();
  p.scalar = scalar_of(input);
  p.tensor_cores = p.scalar != Scalar::f32 || (g.axes() ? context.allowTF32CuDNN() : context.allowTF32CuBLAS());
  p.samples = input.size(0);
  p.channels = static_cast<int>(input.size(1));
  p.out_channels = static_cast<int>(weight.size(0));
  p.groups = static_cast<int>(g.groups);
  p.border = g.mode;
  const auto output_sizes = g.output_sizes(input.sizes(), weight.sizes());
  for (int64_t i = 0; i < g.axes(); ++i) {
    const auto axis = 2 - g.axes() + i;
    p.size[axis] = static_cast<int>(input.size(i + 2));
    p.out_size[axis] = static_cast<int>(output_sizes[i + 2]);
    p.kernel[axis] = static_cast<int>(weight.size(i + 2));
    p.stride[axis] = static_cast<int>(g.stride[i]);
    p.padding[axis] = static_cast<int>(g.padding[2 * i]);
    p.dilation[axis] = static_cast<int>(g.dilation[i]);
  }
  return p;
}

// The axes (K, C, R, S) of a weight in the order in which the kernels read and write it.
std::array<int64_t, 4> weight_order(const ConvProblem& p) {
  return p.depthwise() ? std::array<int64_t, 4>{2, 3, 0, 1} : std::array<int64_t, 4>{0, 2, 3, 1};
}

Tensor forward_weight(const ConvProblem& p, const Tensor& weight) {
  return as_image(weight).permute(weight_order(p)).contiguous();
}
Tensor adjoint_weight(const ConvProblem& p, const Tensor& weight) {
  if (p.depthwise()) return forward_weight(p, weight);
  return as_image(weight).unflatten(0, {p.groups, -1}).permute({0, 2, 3, 4, 1}).contiguous();
}

// Whether our own convolution is asked for. `auto` is torch's: faster on every layer that was measured
// (csrc/cuda/README.md).
bool implicit_gemm_chosen() {
  const char* name = std::getenv("CONVBN_EXT_ALGORITHM");
  const std::string_view value = name ? name : "auto";
  TORCH_CHECK_VALUE(value == "auto" || value == "aten" || value == "implicit_gemm",
                    "conv_bn: CONVBN_EXT_ALGORITHM must be auto, aten or implicit_gemm, got '", value, "'");
  return value == "implicit_gemm";
}

}  // namespace

bool use_implicit_gemm(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  constexpr int64_t most = std::numeric_limits<int>::max();
  const auto sizes = g.padded_sizes(input.sizes());
  return implicit_gemm_chosen() && g.axes() <= 2 && input.scalar_type() != at::kDouble && input.numel() > 0 &&
         std::all_of(sizes.begin() + 1, sizes.end(), [](int64_t size) { return size <= most / 4; }) &&
         weight.numel() <= most && g.groups < 65000;
}

Tensor implicit_gemm(const Tensor& input, const Tensor& weight, const ConvGeometry& g, Tensor* mean, Tensor* var) {
  const ConvProblem p = problem_of(input, weight, g);
  const Launch launch(input);
  const Tensor x = nhwc(input), w = forward_weight(p, weight);
  const Tensor y = at::empty({p.samples, p.out_channels, p.out_size[0], p.out_size[1]},
                             input.options().memory_format(kChannelsLast));
  const Tensor scratch = mean ? launch.vector(input, conv_statistics_size(p)) : Tensor();
  launch_conv_forward(p, data(x), data(w), mutable_data(y), static_cast<double*>(mutable_data(scratch)), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (mean) {
    *mean = launch.vector(input, p.out_channels);
    *var = launch.vector(input, p.out_channels);
    launch_conv_statistics(p, scratch.const_data_ptr<double>(), mean->mutable_data_ptr<double>(),
                           var->mutable_data_ptr<double>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return in_format_of(y, input, g.output_sizes(input.sizes(), weight.sizes()));
}

void as_products_take(BnBackward& bn) {
  bn.y = nhwc(bn.y);
  bn.grad = nhwc(bn.grad);
  if (bn.out.defined()) bn.out = nhwc(bn.out);
}

std::tuple<Tensor, Tensor, Tensor> implicit_gemm_reduce(const BnBackward& bn, const Tensor& input, const Tensor& weight,
                                                        const ConvGeometry& g) {
  const ConvProblem p = problem_of(input, weight, g);
  const Launch launch(bn);
  const Tensor x = nhwc(input), table = at::empty({conv_table_size(p)}, bn.y.options().dtype(at::kFloat));
  const Tensor sum_g = launch.vector(x, p.out_channels), sum_gd = launch.vector(x, p.out_channels),
               products = launch.vector(x, conv_grad_weight_size(p));
  launch_conv_table(launch.problem, nullptr, nullptr, nullptr, table.mutable_data_ptr<float>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  launch_conv_grad_weight(p, launch.problem, table.const_data_ptr<float>(), data(x),
                          products.mutable_data_ptr<double>(), sum_g.mutable_data_ptr<double>(),
                          sum_gd.mutable_data_ptr<double>(), launch.stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {sum_g, sum_gd, products};
}

std::tuple<Tensor, Tensor> implicit_gemm_backward(const BnBackward& bn, const Tensor& a, const Tensor& b,
                                                  const Tensor& c, const Tensor& input, const Tensor& weight,
                                                  const ConvGeometry& g, const Tensor& products, bool needs_input) {
  const ConvProblem p = problem_of(input, weight, g);
  const Launch launch(bn);
  const Tensor a_ = a.contiguous(), b_ = b.contiguous(), c_ = c.contiguous();
  const double *as = a_.const_data_ptr<double>(), *bs = b_.const_data_ptr<double>(), *cs = c_.const_data_ptr<double>();

  Tensor grad_input, grad_weight;
  if (needs_input) {
    ConvProblem q = p;
    const bool folded = p.border != PaddingMode::zeros && g.pads();
    const auto padded = g.padded_sizes(input.sizes());
    if (folded) {  // over the padded input; what the borders copied is added back
      q.border = PaddingMode::zeros;
      for (int64_t i = 0; i < g.axes(); ++i) {
        q.size[2 - g.axes() + i] = static_cast<int>(padded[i + 2]);
        q.padding[2 - g.axes() + i] = 0;
      }
    }
    const Tensor table = at::empty({conv_table_size(p)}, bn.y.options().dtype(at::kFloat));
    launch_conv_table(launch.problem, as, bs, cs, table.mutable_data_ptr<float>(), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor w = adjoint_weight(p, weight);
    const Tensor dx =
        at::empty({q.samples, q.channels, q.size[0], q.size[1]}, bn.y.options().memory_format(kChannelsLast));
    launch_conv_grad_input(q, launch.problem, table.const_data_ptr<float>(), data(w), mutable_data(dx), launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    grad_input = folded ? pad_adjoint(in_format_of(dx, input, padded), input.sizes(), g)
                        : in_format_of(dx, input, input.sizes());
  }
  if (products.defined()) {
    const Tensor dw = at::empty_like(as_image(weight).permute(weight_order(p)), at::MemoryFormat::Contiguous);
    launch_conv_combine_weight(p, launch.problem, as, bs, cs, products.mutable_data_ptr<double>(), mutable_data(dw),
                               launch.stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const auto back = p.depthwise() ? std::array<int64_t, 4>{2, 3, 0, 1} : std::array<int64_t, 4>{0, 3, 1, 2};
    grad_weight = in_format_of(dw.permute(back), weight, weight.sizes());
  }
  return {grad_input, grad_weight};
}

}  // namespace convbn
