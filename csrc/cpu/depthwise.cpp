//   y[r, w] = Σ w[i, j]·x[r·s + i·d − p, w·s + j·d − p],  per channel
//   dx and dw sum the same products over the (r, w) that meet a pixel of x, and over all (r, w)
// Along a row the results fall into stretches that meet the same taps, each tap's pixels at equal distances: the inner
// columns, single ones at the borders and, for dx of a strided convolution, every s-th column. A stretch is one loop
// without branches over its results, see depthwise.inl; rows that miss taps just have fewer.
#include "depthwise.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace convbn {

namespace {

#define CONVBN_LOOPS "depthwise.inl"
#include "each_isa.inl"

using at::Tensor;

struct Tap {
  int64_t tap, source;  // index in the kernel; of the source pixel that the first result meets
};

// Results first, first + step, … along a row
struct Stretch {
  int64_t first, count, step, source_step;
  std::vector<Tap> taps;
};

bool same_taps(const std::vector<Tap>& a, const std::vector<Tap>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](Tap s, Tap t) { return s.tap == t.tap; });
}

// One axis of a convolution, or of its adjoint: from y to x.
struct Axis {
  int64_t source, result, kernel, stride, padding, dilation;
  bool adjoint;

  std::vector<Tap> taps_of(int64_t i) const {
    std::vector<Tap> taps;
    for (int64_t t = 0; t < kernel; ++t) {
      int64_t at = adjoint ? i + padding - t * dilation : i * stride - padding + t * dilation;
      if (adjoint && at % stride != 0) continue;
      if (adjoint) at /= stride;
      if (at >= 0 && at < source) taps.push_back({t, at});
    }
    return taps;
  }

  std::vector<Stretch> stretches() const {
    const int64_t step = adjoint ? stride : 1;
    std::vector<Stretch> found;
    for (int64_t phase = 0; phase < step; ++phase)
      for (int64_t i = phase; i < result; i += step) {
        auto taps = taps_of(i);
        if (i > phase && same_taps(taps, found.back().taps))
          ++found.back().count;
        else
          found.push_back({i, 1, step, adjoint ? 1 : stride, std::move(taps)});
      }
    return found;
  }
};

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
  }

  void forward(const scalar_t* x, int64_t first, int64_t last, scalar_t* y) const override {
    rows(forth_, x, first, last, y);
  }
  void grad_input(const scalar_t* dy, int64_t dy_first, int64_t first, int64_t last, scalar_t* dx) const override {
    rows(back_, dy - dy_first * back_.source_row, first, last, dx);
  }
  void grad_weight(const scalar_t* x, const scalar_t* dy, int64_t first, int64_t last, acc* sums) const override {
    static const auto loop = best_of(&baseline::depthwise_sums<scalar_t>, &avx2::depthwise_sums<scalar_t>,
                                     &avx512::depthwise_sums<scalar_t>);
    for_each_stretch(
        forth_, x, first, last, dy,
        [&](const Stretch& s, const scalar_t* const* source, const int64_t* at, int64_t taps, const scalar_t* grad) {
          loop(source, at, taps, s.source_step * channels_, grad, s.count, channels_, sums);
        });
  }
  Tensor grad_weight_of(const Tensor& sums) const override { return sums.view({-1, channels_}).t().reshape(sizes_); }

 private:
  struct Direction {
    Axis rows;
    std::vector<Stretch> columns;
    int64_t source_row, row;  // elements
  };
  int64_t channels_;
  std::vector<int64_t> sizes_;
  Tensor weight_;  // (kh·kw, C)
  Direction forth_, back_;

  Direction direction(at::IntArrayRef from, at::IntArrayRef to, const ConvGeometry& g, bool adjoint) const {
    const auto axis = [&](int64_t i) {
      return Axis{from[i + 2], to[i + 2], sizes_[i + 2], g.stride[i], g.padding[2 * i], g.dilation[i], adjoint};
    };
    return Direction{axis(0), axis(1).stretches(), from[3] * channels_, to[3] * channels_};
  }

  // f(stretch, source per tap, place of the tap's weights, taps, results); source: row 0, results: row `first`
  template <class T, class F>
  void for_each_stretch(const Direction& d, const scalar_t* source, int64_t first, int64_t last, T* results,
                        F f) const {
    std::vector<const scalar_t*> from(sizes_[2] * sizes_[3]);
    std::vector<int64_t> at(from.size());
    for (int64_t r = first; r < last; ++r, results += d.row) {
      const std::vector<Tap> rows = d.rows.taps_of(r);
      for (const Stretch& s : d.columns) {
        int64_t taps = 0;
        for (const Tap& i : rows)
          for (const Tap& j : s.taps) {
            from[taps] = source + i.source * d.source_row + j.source * channels_;
            at[taps++] = (i.tap * sizes_[3] + j.tap) * channels_;
          }
        f(s, from.data(), at.data(), taps, results + s.first * channels_);
      }
    }
  }

  void rows(const Direction& d, const scalar_t* source, int64_t first, int64_t last, scalar_t* out) const {
    static const auto loop =
        best_of(&baseline::depthwise_row<scalar_t>, &avx2::depthwise_row<scalar_t>, &avx512::depthwise_row<scalar_t>);
    const auto* weight = static_cast<const acc*>(weight_.const_data_ptr());
    for_each_stretch(
        d, source, first, last, out,
        [&](const Stretch& s, const scalar_t* const* from, const int64_t* at, int64_t taps, scalar_t* results) {
          loop(from, at, taps, s.source_step * channels_, weight, results, s.step * channels_, s.count, channels_);
        });
  }
};

}  // namespace

// Two axes, a channel each, channels_last, borders of zeros.
bool takes_depthwise(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  const auto type = input.scalar_type();
  return (type == at::kFloat || type == at::kDouble) && g.axes() == 2 && g.groups > 1 && g.groups == input.size(1) &&
         g.groups == weight.size(0) && !g.pads_explicitly() && input.numel() > 0 && weight.numel() > 0 &&
         input.suggest_memory_format() == at::MemoryFormat::ChannelsLast &&
         input.is_contiguous(at::MemoryFormat::ChannelsLast);
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
