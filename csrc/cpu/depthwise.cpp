//   y[r, w] = Σ w[i, j]·x[r·s + i·d − p, w·s + j·d − p],  per channel
//   dx and dw sum the same products over the (r, w) that meet a pixel of x, and over all (r, w)
// Along a row the results fall into stretches that meet the same taps, each tap's pixels at equal distances: the inner
// columns, single ones at the borders and, for dx of a strided convolution, every s-th column. A stretch is one loop
// without branches over its results, see depthwise.inl; rows that miss taps just have fewer. 16-bit rows are widened
// first, once for all taps that meet them.
#include "depthwise.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "bn_blocks.h"
#include "isa.h"
#include "memory_format.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace convbn {

namespace {

// The taps that a stretch of results meets: all pairs of a row of the source and a column in it, in elements.
template <typename acc>
struct DepthwiseTaps {
  const acc* const* row;
  const int64_t *row_weight, *column, *column_weight;
  int64_t rows, columns;
};

// Rows of dy from `first` on, and the rows of x from x_first on that a 3×3 kernel meets there.
template <typename acc>
struct ThreeByThree {
  const acc *x, *grad;
  int64_t first, rows, columns, x_first, x_height, x_width;
  std::array<int64_t, 2> stride, padding;  // padding is 0 or 1
};

#define CONVBN_LOOPS "depthwise.inl"
#include "each_isa.inl"

using at::Tensor;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;
constexpr int64_t kMostTerms = 128;  // of a sum in float32, but for longer rows

// Taps of a kernel's axis and the source pixels that they are on, times a unit each.
struct AxisTaps {
  std::vector<int64_t> tap, source;
  void scale(int64_t tap_unit, int64_t source_unit) {
    for (int64_t& t : tap) t *= tap_unit;
    for (int64_t& i : source) i *= source_unit;
  }
};

// Results first, first + step, … along a row, and the first one's taps
struct Stretch {
  int64_t first, count, step, source_step;
  AxisTaps taps;
};

// One axis of a convolution, or of its adjoint: from y to x.
struct Axis {
  int64_t source, result, kernel, stride, padding, dilation;
  bool adjoint;

  AxisTaps taps_of(int64_t i) const {
    AxisTaps taps;
    for (int64_t t = 0; t < kernel; ++t) {
      int64_t at = adjoint ? i + padding - t * dilation : i * stride - padding + t * dilation;
      if (adjoint && at % stride != 0) continue;
      if (adjoint) at /= stride;
      if (at < 0 || at >= source) continue;
      taps.tap.push_back(t);
      taps.source.push_back(at);
    }
    return taps;
  }

  std::vector<Stretch> stretches() const {
    const int64_t step = adjoint ? stride : 1;
    std::vector<Stretch> found;
    for (int64_t phase = 0; phase < step; ++phase)
      for (int64_t i = phase; i < result; i += step) {
        auto taps = taps_of(i);
        if (i > phase && taps.tap == found.back().taps.tap)
          ++found.back().count;
        else
          found.push_back({i, 1, step, adjoint ? 1 : stride, std::move(taps)});
      }
    return found;
  }
};

// Without dilation, and at most one tap beside x at a border.
bool is_three_by_three(at::IntArrayRef input, at::IntArrayRef weight, const ConvGeometry& g) {
  const auto along = [&](int64_t i) {
    return weight[i + 2] == 3 && g.dilation[i] == 1 && g.padding[2 * i] <= 1 && input[i + 2] > 1;
  };
  return along(0) && along(1);
}

template <typename scalar_t>
class Depthwise final : public RowsConvolution<scalar_t> {
  using acc = acc_t<scalar_t>;

 public:
  Depthwise(at::IntArrayRef input, const Tensor& weight, const ConvGeometry& g)
      : channels_(input[1]),
        sizes_(weight.sizes().vec()),
        weight_(weight.flatten(1).t().to(c10::CppTypeToScalarType<acc>::value).contiguous()) {
    const auto output = g.output_sizes(input, sizes_);
    forth_ = direction(input, output, g, /*adjoint=*/false);
    back_ = direction(output, input, g, /*adjoint=*/true);
    three_by_three_ = is_three_by_three(input, sizes_, g);
    window_ = {.columns = output[3], .x_height = input[2], .x_width = input[3]};
    window_.stride = {g.stride[0], g.stride[1]}, window_.padding = {g.padding[0], g.padding[2]};
  }

  void forward(const scalar_t* x, int64_t first, int64_t last, scalar_t* y) const override {
    rows(forth_, x, first, last, y);
  }
  void grad_input(const scalar_t* dy, int64_t dy_first, int64_t first, int64_t last, scalar_t* dx) const override {
    rows(back_, dy - dy_first * back_.source_row, first, last, dx);
  }
  void grad_weight(const scalar_t* x, const scalar_t* dy, int64_t first, int64_t last, acc* sums) const override {
    static const auto loop =
        best_of(&baseline::depthwise_sums<acc>, &avx2::depthwise_sums<acc>, &avx512::depthwise_sums<acc>);
    thread_local AlignedVector<acc> buffer;
    const acc* const grad = widened(dy, (last - first) * forth_.row, buffer);
    if (three_by_three_) return grad_weight_3x3(x, grad, first, last, sums);
    for_each_stretch(forth_, x, first, last, [&](const Stretch& s, const DepthwiseTaps<acc>& taps, int64_t i) {
      loop(taps, s.source_step * channels_, grad + i, s.count, channels_, sums);
    });
  }
  Tensor grad_weight_of(const Tensor& sums) const override { return sums.view({-1, channels_}).t().reshape(sizes_); }

 private:
  struct Direction {
    std::vector<AxisTaps> rows;  // of every row
    std::vector<Stretch> columns;
    int64_t source_row, row;  // elements
  };
  int64_t channels_;
  std::vector<int64_t> sizes_;
  Tensor weight_;  // (kh·kw, C)
  Direction forth_, back_;
  bool three_by_three_;
  ThreeByThree<acc> window_;  // of no rows yet

  Direction direction(at::IntArrayRef from, at::IntArrayRef to, const ConvGeometry& g, bool adjoint) const {
    const auto axis = [&](int64_t i) {
      return Axis{from[i + 2], to[i + 2], sizes_[i + 2], g.stride[i], g.padding[2 * i], g.dilation[i], adjoint};
    };
    Direction d{{}, axis(1).stretches(), from[3] * channels_, to[3] * channels_};
    for (Stretch& s : d.columns) s.taps.scale(channels_, channels_);
    for (int64_t r = 0; r < to[2]; ++r) {
      d.rows.push_back(axis(0).taps_of(r));
      d.rows.back().scale(sizes_[3] * channels_, d.source_row);
    }
    return d;
  }

  static const acc* widened(const scalar_t* in, int64_t n, AlignedVector<acc>& buffer) {
    if constexpr (std::is_same_v<acc, scalar_t>) {
      return in;
    } else {
      static const auto loop = best_of(&baseline::widen_elements<scalar_t>, &avx2::widen_elements<scalar_t>,
                                       &avx512::widen_elements<scalar_t>);
      buffer.resize(n);
      loop(in, buffer.data(), n);
      return buffer.data();
    }
  }

  void grad_weight_3x3(const scalar_t* x, const acc* grad, int64_t first, int64_t last, acc* sums) const {
    static const auto loop =
        best_of(&baseline::depthwise_sums_3x3<acc>, &avx2::depthwise_sums_3x3<acc>, &avx512::depthwise_sums_3x3<acc>);
    thread_local AlignedVector<acc> buffer;
    const int64_t stride = window_.stride[0], padding = window_.padding[0], row = forth_.source_row;
    const int64_t low = std::max<int64_t>(first * stride - padding, 0);
    const int64_t high = std::min((last - 1) * stride - padding + 3, window_.x_height);
    const int64_t some = std::max<int64_t>(kMostTerms / window_.columns, 1);
    ThreeByThree<acc> window = window_;
    window.x = widened(x + low * row, (high - low) * row, buffer), window.x_first = low;
    for (int64_t r = first; r < last; r += some) {
      window.grad = grad + (r - first) * forth_.row, window.first = r, window.rows = std::min(some, last - r);
      loop(window, channels_, sums);
    }
  }

  // f(stretch, its taps, its first result counted from the start of row `first`); source: row 0
  template <class F>
  void for_each_stretch(const Direction& d, const scalar_t* source, int64_t first, int64_t last, F f) const {
    int64_t low = INT64_MAX, high = 0;  // of the source, met by any of these rows
    for (int64_t r = first; r < last; ++r)
      for (const int64_t at : d.rows[r].source) low = std::min(low, at), high = std::max(high, at + d.source_row);
    if (low > high) low = high;
    thread_local AlignedVector<acc> buffer;
    thread_local std::vector<const acc*> from;
    const acc* const wide = widened(source + low, high - low, buffer);
    from.resize(sizes_[2]);
    for (int64_t r = first; r < last; ++r) {
      const AxisTaps& rows = d.rows[r];
      for (size_t i = 0; i < rows.source.size(); ++i) from[i] = wide + (rows.source[i] - low);
      for (const Stretch& s : d.columns)
        f(s,
          DepthwiseTaps<acc>{from.data(), rows.tap.data(), s.taps.source.data(), s.taps.tap.data(),
                             static_cast<int64_t>(rows.tap.size()), static_cast<int64_t>(s.taps.tap.size())},
          (r - first) * d.row + s.first * channels_);
    }
  }

  void rows(const Direction& d, const scalar_t* source, int64_t first, int64_t last, scalar_t* out) const {
    static const auto loop = best_of(&baseline::depthwise_row<acc, scalar_t>, &avx2::depthwise_row<acc, scalar_t>,
                                     &avx512::depthwise_row<acc, scalar_t>);
    const auto* weight = static_cast<const acc*>(weight_.const_data_ptr());
    for_each_stretch(d, source, first, last, [&](const Stretch& s, const DepthwiseTaps<acc>& taps, int64_t i) {
      loop(taps, s.source_step * channels_, weight, out + i, s.step * channels_, s.count, channels_);
    });
  }
};

}  // namespace

// The one kernel for which the library has a loop of its own. Ours, with batch normalisation inside, is faster in
// float32 on rows of some length (measured: 1.03 to 1.14 times at 28 to 56 pixels, 0.7 to 0.95 at 4 to 16, and 1.5 to 3
// times for other kernels, strides and dilations, on one thread and on two).
static bool library_is_faster(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  const auto type = input.scalar_type();
  const auto is = [](at::IntArrayRef sizes, int64_t n) { return sizes[0] == n && sizes[1] == n; };
  const bool usual = is(weight.sizes().slice(2), 3) && is(g.stride, 1) && is(g.dilation, 1);
  return usual && (type == at::kBFloat16 || (type == at::kFloat && (input.size(1) < 16 || input.size(3) < 24)));
}

// Two axes, a channel each, borders of zeros.
static bool is_depthwise(const Tensor& input, at::IntArrayRef weight, const ConvGeometry& g) {
  return g.axes() == 2 && g.groups > 1 && g.groups == input.size(1) && g.groups == weight[0] && !g.pads_explicitly() &&
         input.numel() > 0 && weight[2] * weight[3] > 0;
}

static bool is_channels_last(const Tensor& t) { return t.suggest_memory_format() == kLast && t.is_contiguous(kLast); }

bool takes_depthwise(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return is_depthwise(input, weight.sizes(), g) && is_channels_last(input) && !library_is_faster(input, weight, g);
}

constexpr int64_t kMostSlices = 16;
constexpr int64_t kShortRow = 14;  // of dy: here channels_last pays for contiguous tensors, too

bool takes_grad_weight_depthwise(const Tensor& grad_output, const Tensor& input, at::IntArrayRef weight,
                                 const ConvGeometry& g) {
  const auto type = input.scalar_type();
  if (!is_depthwise(input, weight, g) || grad_output.numel() == 0) return false;
  if (type == at::kFloat && is_three_by_three(input.sizes(), weight, g) && grad_output.size(3) <= kShortRow)
    return true;
  return (type == at::kFloat || type == at::kBFloat16) && is_channels_last(input) && grad_output.is_contiguous(kLast);
}

// The rows of all images are cut into slices by their number alone, whose sums are added in order.
template <typename scalar_t>
static Tensor grad_weight_of(const Tensor& grad_output, const Tensor& input, at::IntArrayRef weight_sizes,
                             const ConvGeometry& g) {
  const Depthwise<scalar_t> convolution(input.sizes(), input.new_empty({1}).expand(weight_sizes), g);
  const int64_t images = input.size(0), rows = grad_output.size(2), all = images * rows;
  const int64_t image = input.numel() / images, row = grad_output.numel() / all, slices = std::min(all, kMostSlices);
  const Tensor parts = at::zeros({slices, c10::multiply_integers(weight_sizes)}, at::kFloat);
  float* const sums = parts.mutable_data_ptr<float>();
  const auto* const x = static_cast<const scalar_t*>(input.const_data_ptr());
  const auto* const dy = static_cast<const scalar_t*>(grad_output.const_data_ptr());
  at::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice)
      for (int64_t r = slice * all / slices, last = (slice + 1) * all / slices; r < last;) {
        const int64_t first = r % rows, count = std::min(rows - first, last - r);
        convolution.grad_weight(x + r / rows * image, dy + r * row, first, first + count, sums + slice * parts.size(1));
        r += count;
      }
  });
  return convolution.grad_weight_of(parts.sum(0, false, at::kDouble)).to(input.scalar_type());
}

Tensor grad_weight_depthwise(const Tensor& grad_output, const Tensor& input, at::IntArrayRef weight_sizes,
                             const ConvGeometry& g) {
  return (input.scalar_type() == at::kFloat
              ? grad_weight_of<float>
              : grad_weight_of<bf16>)(to_format(grad_output, kLast), to_format(input, kLast), weight_sizes, g);
}

template <typename scalar_t>
std::unique_ptr<RowsConvolution<scalar_t>> make_depthwise(at::IntArrayRef input, const Tensor& weight,
                                                          const ConvGeometry& g) {
  return std::make_unique<Depthwise<scalar_t>>(input, weight, g);
}

template std::unique_ptr<RowsConvolution<double>> make_depthwise(at::IntArrayRef, const Tensor&, const ConvGeometry&);
template std::unique_ptr<RowsConvolution<float>> make_depthwise(at::IntArrayRef, const Tensor&, const ConvGeometry&);
template std::unique_ptr<RowsConvolution<bf16>> make_depthwise(at::IntArrayRef, const Tensor&, const ConvGeometry&);
template std::unique_ptr<RowsConvolution<f16>> make_depthwise(at::IntArrayRef, const Tensor&, const ConvGeometry&);

}  // namespace convbn
