// Which way a 2-d convolution is computed: matrix products, our own kernels or the library's, in which memory format.
//
//   1×1, one group, no padding: matrix products. With rows(t) the view (N·H·W, C) of a channels_last tensor
//     rows(y) = rows(x) Wᵀ,  rows(dx) = rows(dy) W,  dW = Σ rows(dy)ᵀ rows(x), the sum over pieces of the rows
//   and with planes(t) the view (N, C, H·W) of a contiguous one
//     planes(y) = W planes(x),  planes(dx) = Wᵀ planes(dy),  dW = Σ planes(dy) planes(x)ᵀ, the sum over samples.
//   Pieces and samples are computed each by itself and added in order, whatever the number of threads. A stride leaves
//   out pixels before the product.
//
//   float32, 3×3, enough channels: Winograd's algorithm, in channels_last.
//
//   Everything else: our AMX kernels want channels_last; the library computes in channels_last or in blocks of 16
//   channels, to which it brings a contiguous tensor anew in every call, more slowly than to_format does. Where its
//   results depend on the number of threads we take our own, or give one thread at a time a part: dw, and see
//   library_sums.h.
//
// Every way takes and gives the memory format that torch's convolution would.
#include "../convolution_plan.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "block_product.h"
#include "convolution_amx.h"
#include "gathered_convolution.h"
#include "grad_input_by_images.h"
#include "grad_weight.h"
#include "library_sums.h"
#include "memory_format.h"
#include "narrow.h"
#include "stream.h"
#include "winograd.h"

namespace convbn {

using at::IntArrayRef;
using at::Tensor;
using Format = at::MemoryFormat;

namespace {

bool channels_last(const Tensor& t) { return t.suggest_memory_format() == Format::ChannelsLast; }

// ---- in the memory format that the arguments have: our own kernels or the library's ----

// With one thread torch convolves few images with a kernel of one tap by an algorithm of its own, if the taps lie side
// by side. One tap does not care where the next would be.
std::vector<int64_t> library_dilation(const Tensor& weight, const ConvGeometry& g) {
  std::vector<int64_t> dilation = g.dilation;
  if (weight.scalar_type() == at::kFloat && weight.sizes().back() == 1) dilation.back() = 2;
  return dilation;
}

Tensor direct(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (output_depends_on_threads(x.sizes(), x, weight, g)) return convolve_gathered(x, weight, g);
  if (takes_convolve_amx(x, weight, x.sizes(), g.output_sizes(x.sizes(), weight.sizes()), g))
    return convolve_amx(x, weight, g);
  const auto [data, padding] = padded_input(x, weight, g);
  const std::vector<int64_t> zero(g.axes(), 0);
  return at::convolution(data, weight, {}, g.stride, padding, library_dilation(weight, g), /*transposed=*/false, zero,
                         g.groups);
}

std::tuple<Tensor, Tensor> direct_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                           const ConvGeometry& g, bool needs_input, bool needs_weight) {
  const bool depends = grad_input_depends_on_threads(x.sizes(), weight, g);
  const auto input_by = !needs_input                                                  ? nullptr
                        : takes_grad_input_narrow(grad_output, weight, x.sizes(), g)  ? grad_input_narrow
                        : depends && suits_grad_input_by_images(weight, x.sizes(), g) ? grad_input_by_images
                        : depends                                                     ? grad_input_gathered
                        : takes_convolve_amx(grad_output, weight, x.sizes(), grad_output.sizes(), g) ? grad_input_amx
                                                                                                     : nullptr;
  const auto weight_by = needs_weight && takes_own_grad_weight(grad_output, x) ? own_grad_weight : nullptr;
  const std::array<bool, 3> library{needs_input && !input_by, needs_weight && !weight_by, false};
  Tensor grad_input, grad_weight;
  if (library[0] || library[1]) {
    const auto [dy, padding] = padded_grad_output(grad_output, weight, g);
    const std::vector<int64_t> zero(g.axes(), 0);
    std::tie(grad_input, grad_weight, std::ignore) =
        at::convolution_backward(dy, x, weight, at::OptionalIntArrayRef(), g.stride, padding,
                                 library_dilation(weight, g), /*transposed=*/false, zero, g.groups, library);
  }
  if (input_by) grad_input = input_by(grad_output, weight, x.sizes(), g);
  if (weight_by) grad_weight = weight_by(grad_output, x, weight.sizes(), g);
  return {grad_input, grad_weight};
}

// ---- 1×1: matrix products ----

bool is_product(const Tensor& weight, const ConvGeometry& g) {
  const auto padding = library_padding(g);
  return g.groups == 1 && weight.size(2) == 1 && weight.size(3) == 1 &&
         std::all_of(padding.begin(), padding.end(), [](int64_t p) { return p == 0; });
}

bool strided(const ConvGeometry& g) { return g.stride[0] != 1 || g.stride[1] != 1; }

// The pixels of x that a kernel of one tap meets.
Tensor met(const Tensor& x, const ConvGeometry& g) {
  return x.slice(2, 0, std::nullopt, g.stride[0]).slice(3, 0, std::nullopt, g.stride[1]);
}

// The pixels of grad where they were met, zeros between them; in channels_last row by row, each written once.
Tensor scattered(const Tensor& grad, IntArrayRef sizes, const ConvGeometry& g) {
  if (!strided(g)) return grad;
  if (!channels_last(grad)) {
    const Tensor result = at::zeros(sizes, grad.options());
    met(result, g).copy_(grad);
    return result;
  }
  const Tensor result = at::empty(sizes, grad.options().memory_format(Format::ChannelsLast));
  const int64_t height = sizes[2], pixel = sizes[1] * grad.element_size(), row = sizes[3] * pixel;
  const int64_t grad_height = grad.size(2), grad_width = grad.size(3);
  const bool streams = result.nbytes() >= kStreamBytes;
  const auto* from = static_cast<const char*>(grad.const_data_ptr());
  auto* to = static_cast<char*>(result.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / row);
  at::parallel_for(0, sizes[0] * height, grain, [&](int64_t r, int64_t end) {
    const std::vector<char> zeros(row);
    std::vector<char> spread(row);
    for (; r < end; ++r) {
      const int64_t n = r / height, h = r % height;
      const bool is_met = h % g.stride[0] == 0;
      const char* next = from + (n * grad_height + h / g.stride[0]) * grad_width * pixel;
      for (int64_t w = 0; is_met && w < grad_width; ++w, next += pixel)
        std::memcpy(&spread[w * g.stride[1] * pixel], next, pixel);
      const char* here = is_met ? spread.data() : zeros.data();
      if (streams)
        stream_copy(to + r * row, here, row);
      else
        std::memcpy(to + r * row, here, row);
    }
  });
  return result;
}

Tensor rows(const Tensor& t) {
  return to_format(t, Format::ChannelsLast).permute({0, 2, 3, 1}).reshape({-1, t.size(1)});
}

Tensor from_rows(const Tensor& t, const Tensor& like) {
  return t.view({like.size(0), like.size(2), like.size(3), t.size(1)}).permute({0, 3, 1, 2});
}

Tensor planes(const Tensor& t) { return to_format(t, Format::Contiguous).flatten(2); }

// For every sample w x, w (A, B), x (N, B, H·W)
Tensor each_product(const Tensor& w, const Tensor& x) { return block_product(w.expand({x.size(0), -1, -1}), x); }

constexpr int64_t kPieceRows = 1024;  // a piece has at least so many, enough to be worth a product of its own
// or these, where there are few rows and light sums: one long sum in float32 rounded 3.7 times as much as torch's
constexpr int64_t kShortPiece = 64, kMostShortPieces = 16, kLightSums = 1 << 16;

// aᵀ b, a (M, A), b (M, B)
Tensor sum_of_products(const Tensor& a, const Tensor& b) {
  const int64_t light = std::min(kMostShortPieces, kLightSums / (a.size(1) * b.size(1)));
  const int64_t pieces = std::max(a.size(0) / kPieceRows, std::min(a.size(0) / kShortPiece, light));
  if (pieces < 2) return block_product(a.t(), b);
  const int64_t length = a.size(0) / pieces, whole = pieces * length, rest = a.size(0) - whole;
  const auto split = [&](const Tensor& t) { return t.narrow(0, 0, whole).view({pieces, length, t.size(1)}); };
  const Tensor sum = block_product(split(a).transpose(1, 2), split(b)).sum(0);
  return rest ? sum.add_(block_product(a.narrow(0, whole, rest).t(), b.narrow(0, whole, rest))) : sum;
}

// x as dy: without the pixels that a stride leaves out
Tensor grad_weight_by_rows(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const ConvGeometry g{{1, 1}, {0, 0, 0, 0}, {1, 1}};
  if (x.scalar_type() == at::kBFloat16) return own_grad_weight(dy, x, weight.sizes(), g);
  return sum_of_products(rows(dy), rows(x)).view(weight.sizes());
}

Tensor by_planes(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  const Tensor seen = met(x, g);
  return each_product(weight.flatten(1), planes(seen)).unflatten(2, seen.sizes().slice(2));
}

std::tuple<Tensor, Tensor> by_planes_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                              const ConvGeometry& g, bool needs_input, bool needs_weight) {
  const Tensor seen = met(x, g), dy = planes(grad_output);
  Tensor grad_input, grad_weight;
  if (needs_input)
    grad_input = scattered(each_product(weight.flatten(1).t(), dy).unflatten(2, seen.sizes().slice(2)), x.sizes(), g);
  if (needs_weight) grad_weight = block_product(dy, planes(seen).transpose(1, 2)).sum(0).view(weight.sizes());
  return {grad_input, grad_weight};
}

// ---- the rules, by measurements on both sides of each, forward and backward together, on two threads with AMX ----

// The memory format of the arguments and of the computation, and what is a matrix product or Winograd's.
struct Plan {
  Format given, format;
  bool planes = false, rows = false, input_rows = false, weight_rows = false, winograd = false, weight_winograd = false;
  // The library's sums in its blocks of channels round less than those in channels_last, and so must ours.
  bool large_tiles() const { return given == Format::ChannelsLast; }
};

// The layers for which they were measured.
bool has_plan(const Tensor& t) {
  return t.is_cpu() && t.dim() == 4 && t.numel() > 0 && at::globalContext().userEnabledMkldnn() &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16);
}

Plan plan_product(Format given, bool half, IntArrayRef input, const Tensor& weight, int64_t pixels,
                  const ConvGeometry& g) {
  // Weights that outweigh half of a sample make its product a thin one. In bfloat16 32 channels are one tile.
  const int64_t out = weight.size(0), in = weight.size(1);
  const bool thin = 2 * out * in > (out + in) * pixels, wide = std::min(out, in) > 32;
  if (given == Format::Contiguous && !thin) return {.given = given, .format = given, .planes = true};
  if (half) {
    const bool by_rows = wide && !strided(g);
    return {
        .given = given, .format = Format::ChannelsLast, .rows = by_rows, .input_rows = by_rows, .weight_rows = wide};
  }
  const bool input_rows = grad_input_depends_on_threads(input, weight, g);  // or else the library's
  return {.given = given, .format = given, .input_rows = input_rows, .weight_rows = true};
}

constexpr int64_t kLightWeight = 1 << 20;

Plan plan(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  const Format given = channels_last(x) || channels_last(weight) ? Format::ChannelsLast : Format::Contiguous;
  const auto sizes = g.output_sizes(x.sizes(), weight.sizes());
  const int64_t pixels = sizes[2] * sizes[3];
  const bool half = x.scalar_type() == at::kBFloat16;
  if (is_product(weight, g)) return plan_product(given, half, x.sizes(), weight, pixels, g);
  if (half) return {given, Format::ChannelsLast};
  const bool winograd = suits_winograd(x.sizes(), weight.sizes(), g, /*large=*/given == Format::ChannelsLast);
  // In float32 blocks of channels are faster for few pixels, and where a depthwise layer consists of them. But with
  // groups the library's results in blocks depend on the number of threads.
  const bool depthwise = g.groups > 1 && g.groups == x.size(1) && g.groups == weight.size(0);
  const bool blocks = depthwise && g.groups % 16 == 0, few = g.groups == 1 && pixels <= 16;
  const bool small = pixels < 256 && (depthwise || g.groups == 1);
  const Format library = few ? Format::Contiguous : small || blocks ? given : Format::ChannelsLast;
  // dw has no large tiles. Where few of the small ones are whole our own products are as fast, if the weights are
  // heavy.
  const bool weight_winograd = suits_winograd(x.sizes(), weight.sizes(), g, weight.numel() <= kLightWeight);
  return {.given = given,
          .format = winograd ? Format::ChannelsLast : library,
          .winograd = winograd,
          .weight_winograd = weight_winograd};
}

}  // namespace

bool beats_fused_inference(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (output_depends_on_threads(x.sizes(), x, weight, g)) return true;
  if (!has_plan(x) || weight.numel() == 0) return false;
  const Plan p = plan(x, weight, g);
  return p.winograd || (p.given == Format::Contiguous && (p.planes || p.rows));
}

bool turns_to_channels_last(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (!has_plan(x) || channels_last(x) || channels_last(weight)) return false;
  const int64_t to = weight.size(0) / g.groups, from = weight.size(1);
  if (x.scalar_type() == at::kFloat) {
    if (g.groups == 1) return from > 4 && plan(x, weight, g).format == Format::ChannelsLast;
    return g.groups != weight.size(0) && (to % 8 || from % 8);  // otherwise sums depend on the number of threads
  }
  return g.groups == 1 && x.numel() >= c10::multiply_integers(g.output_sizes(x.sizes(), weight.sizes()));
}

Tensor planned_convolve(const Tensor& x, const Tensor& weight, const ConvGeometry& g) {
  if (!has_plan(x) || weight.numel() == 0) return direct(x, weight, g);
  const Plan p = plan(x, weight, g);
  if (p.planes) return by_planes(x, weight, g);
  if (p.rows) return to_format(from_rows(block_product(rows(x), weight.flatten(1).t()), x), p.given);
  if (p.winograd) return to_format(convolve_winograd(to_format(x, p.format), weight, g, p.large_tiles()), p.given);
  return to_format(direct(to_format(x, p.format), to_format(weight, p.format), g), p.given);
}

std::tuple<Tensor, Tensor> planned_convolve_backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight,
                                                     const ConvGeometry& g, bool needs_input, bool needs_weight) {
  if (!has_plan(grad_output) || x.numel() == 0 || weight.numel() == 0)
    return direct_backward(grad_output, x, weight, g, needs_input, needs_weight);
  const Plan p = plan(x, weight, g);
  if (p.planes) return by_planes_backward(grad_output, x, weight, g, needs_input, needs_weight);
  const Tensor dy = to_format(grad_output, p.format);
  const bool plain_input = needs_input && !p.input_rows && !p.winograd;
  const bool plain_weight = needs_weight && !p.weight_rows && !p.weight_winograd;
  Tensor dx, dw;
  if (plain_input || plain_weight) {  // the library takes the format from x, also where it needs no more of x than that
    const bool has_format = plain_weight || x.is_contiguous(p.format);
    std::tie(dx, dw) =
        direct_backward(dy, has_format ? to_format(x, p.format) : at::empty_like(x, p.format),
                        plain_input ? to_format(weight, p.format) : weight, g, plain_input, plain_weight);
  }
  if (needs_input && p.input_rows)
    dx = scattered(from_rows(block_product(rows(dy), weight.flatten(1)), dy), x.sizes(), g);
  if (needs_weight && p.weight_rows) dw = grad_weight_by_rows(dy, to_format(met(x, g), p.format), weight);
  if (needs_input && p.winograd) dx = grad_input_winograd(dy, weight, x.sizes(), g, p.large_tiles());
  if (needs_weight && p.weight_winograd) {
    const auto last = Format::ChannelsLast;
    dw = grad_weight_winograd(to_format(dy, last), to_format(x, last), weight.sizes(), g,
                              weight.suggest_memory_format());
  }
  return {needs_input ? to_format(dx, p.given) : dx,
          needs_weight && !p.weight_rows ? to_format(dw, weight.suggest_memory_format()) : dw};
}

}  // namespace convbn
