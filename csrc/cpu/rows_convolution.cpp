#include "rows_convolution.h"

#include <ATen/Parallel.h>

#include "bn_cpu.h"
#include "depthwise.h"
#include "narrow.h"
#include "stream.h"

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kBandElements = 1 << 16;  // of dy: with y, grad, x and dx beside it, what the L2 cache holds
constexpr int64_t kStreamRows = 8;          // of dx at a time, where they go past the caches
constexpr int64_t kBands = 16;              // at least, if there are so many rows: work for many threads

template <typename scalar_t>
std::unique_ptr<RowsConvolution<scalar_t>> rows_convolution(at::IntArrayRef input, const Tensor& weight,
                                                            const ConvGeometry& g) {
  if constexpr (std::is_same_v<scalar_t, float>)
    if (g.groups == 1) return make_narrow(input, weight, g);
  return make_depthwise<scalar_t>(input, weight, g);
}

// Rows [first, last) of dy that rows of dx meet.
std::pair<int64_t, int64_t> rows_met(int64_t dx_first, int64_t dx_last, int64_t kernel, const ConvGeometry& g) {
  const auto floor_divide = [](int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; };
  const int64_t s = g.stride[0], p = g.padding[0];
  return {floor_divide(dx_first + p - (kernel - 1) * g.dilation[0] + s - 1, s), floor_divide(dx_last - 1 + p, s) + 1};
}

}  // namespace

bool own_rows_convolution(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return takes_depthwise(input, weight, g) || takes_narrow(input, weight, g);
}

Tensor convolve_rows(const Tensor& input, const Tensor& weight, const ConvGeometry& g, Tensor* mean, Tensor* var) {
  return dispatch(input, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
    const auto convolution = rows_convolution<scalar_t>(input.sizes(), weight, g);
    const Tensor y = at::empty(g.output_sizes(input.sizes(), weight.sizes()),
                               input.options().memory_format(at::MemoryFormat::ChannelsLast));
    const int64_t image = input.numel() / input.size(0), height = y.size(2), row = y.size(3) * y.size(1);
    const scalar_t* x = data<scalar_t>(input);
    scalar_t* y_data = mutable_data<scalar_t>(y);
    const Blocks blocks(y, row);
    const bool streams = y.nbytes() >= kStreamBytes;
    const auto fill = [&](const Blocks::Block& b) -> const scalar_t* {
      thread_local AlignedVector<scalar_t> copy;
      if (streams) copy.resize(b.elements);
      scalar_t* const to = streams ? copy.data() - b.element : y_data;
      const int64_t end = (b.element + b.elements) / row;
      for (int64_t line = b.element / row, next; line < end; line = next) {
        const int64_t n = line / height;
        next = std::min(end, (n + 1) * height);
        convolution->forward(x + n * image, line - n * height, next - n * height, to + line * row);
      }
      if (streams) stream_copy(y_data + b.element, copy.data(), b.elements * sizeof(scalar_t));
      return to;
    };
    if (mean)
      std::tie(*mean, *var) = moments(y, blocks, loops, fill);
    else
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) { fill(b); });
    return y;
  });
}

std::tuple<Tensor, Tensor> convolve_rows_backward(const BnBackward& bn, const Tensor& a, const Tensor& b,
                                                  const Tensor& c, const Tensor& input, const Tensor& weight,
                                                  const ConvGeometry& g, bool needs_input, bool needs_weight,
                                                  const Tensor& grad_residual) {
  return dispatch(bn.y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
    using acc = acc_t<scalar_t>;
    const auto convolution = rows_convolution<scalar_t>(input.sizes(), weight, g);
    const Blocks blocks(bn.y);
    const GradientColumns<scalar_t> columns(blocks, bn, a, b, c);
    const auto apply_loop = loops.backward_apply[static_cast<int>(bn.activation)];
    const int64_t images = input.size(0), height = bn.y.size(2), row = bn.y.size(3) * bn.y.size(1);
    const int64_t x_height = input.size(2), x_row = input.size(3) * input.size(1);
    const int64_t most = std::clamp<int64_t>(images * height / kBands, 1, height);
    const int64_t band = std::clamp<int64_t>(kBandElements / row, 1, most), bands = (height + band - 1) / band;
    const Tensor dx = needs_input ? at::empty_like(input) : Tensor();
    const Tensor parts = at::empty({needs_weight ? images * bands : 0, weight.numel()},
                                   at::TensorOptions(c10::CppTypeToScalarType<acc>::value));
    const scalar_t* const x = data<scalar_t>(input);
    scalar_t *const dx_data = mutable_data<scalar_t>(dx), *const dr = mutable_data<scalar_t>(grad_residual);
    const bool streams = needs_input && dx.nbytes() >= kStreamBytes;
    at::parallel_for(0, images * bands, 1, [&](int64_t begin, int64_t end) {
      thread_local AlignedVector<scalar_t> dy, dx_rows;
      if (streams) dx_rows.resize(kStreamRows * x_row);
      for (int64_t unit = end; unit-- > begin;) {  // what backward_reduce read last may still be in a cache
        const int64_t n = unit / bands, first = unit % bands * band, last = std::min(first + band, height);
        const int64_t x_first = std::min(first * g.stride[0], x_height);
        const int64_t x_last = last == height ? x_height : std::min(last * g.stride[0], x_height);
        int64_t low = first, high = last;
        if (needs_input && x_first < x_last) {
          const auto [from, to] = rows_met(x_first, x_last, weight.size(2), g);
          low = std::clamp<int64_t>(from, 0, first), high = std::clamp(to, last, height);
        }
        dy.resize((high - low) * row);
        const auto apply = [&](int64_t from, int64_t to, scalar_t* residual) {
          if (from == to) return;
          const int64_t i = (n * height + from) * row;
          apply_loop(columns.args(i, 0, dy.data() + (from - low) * row, at_offset(residual, i)),
                     Span{(to - from) * row, blocks.parameters, 1, blocks.parameters});
        };
        apply(low, first, nullptr);
        apply(first, last, dr);
        apply(last, high, nullptr);
        for (int64_t r = x_first, next; needs_input && r < x_last; r = next) {
          next = streams ? std::min(r + kStreamRows, x_last) : x_last;
          scalar_t* const to = dx_data + (n * x_height + r) * x_row;
          convolution->grad_input(dy.data(), low, r, next, streams ? dx_rows.data() : to);
          if (streams) stream_copy(to, dx_rows.data(), (next - r) * x_row * sizeof(scalar_t));
        }
        if (needs_weight) {
          acc* const sums = mutable_data<acc>(parts) + unit * weight.numel();
          std::fill_n(sums, weight.numel(), acc{0});
          convolution->grad_weight(x + n * x_height * x_row, dy.data() + (first - low) * row, first, last, sums);
        }
      }
    });
    const Tensor dw =
        needs_weight
            ? convolution->grad_weight_of(parts.sum(0, /*keepdim=*/false, at::kDouble)).to(weight.scalar_type())
            : Tensor();
    return std::make_tuple(dx, dw);
  });
}

}  // namespace convbn
