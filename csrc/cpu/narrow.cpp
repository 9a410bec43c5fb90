// A row of the kernel meets neighbours in memory, t = j·C_in + c, so that, with zeros around x,
//   y[r, w, :]   = Σᵢ Σₜ x[r·s + i − p, (w·s − p)·C_in + t]·W[i, t, :]
//   dW[i, t, :]  = Σᵣ Σ_w x[r·s + i − p, (w·s − p)·C_in + t]·dy[r, w, :]
// are products of matrices that overlap in memory, with C_out side by side. For dx the taps are side by side:
//   z[r, w, :]   = dy[r, w, :]·Wᵀ,  dx[r, w, :] = Σᵢⱼ z[(r + p − i)/s, (w + p − j)/s, (i, j, :)]
#include "narrow.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "bn_blocks.h"
#include "isa.h"

namespace convbn {

namespace {

// out[m, n] = Σ_s Σ_k a_s[m, k]·b[s·depth + k, n], m < rows, n < columns (at least 16), s < segments
// a_s[m, k] is a[s][m·a_stride + k], or a[s][k·a_stride + m] in the transposed product, which adds to out
struct ProductArgs {
  const float* const* a;
  int64_t segments, depth, a_stride;
  const float* b;
  float* out;
  int64_t rows, columns;  // rows of b and out follow each other
};

// out[q, c] = Σ_i Σ_j rows[i][(q + padding − j)/stride·pixel + j·channels + c], where that is a pixel below `width`;
// at most 4 channels; reads and writes up to three values behind a row
struct GatherArgs {
  const float* const* rows;
  int64_t row_count, pixel, width;
  int64_t channels, kernel, stride, padding;
  float* out;
  int64_t count;
};

#define CONVBN_LOOPS "narrow.inl"
#include "each_isa.inl"

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kMostChannels = 4;        // of x: one vector of `gather`
constexpr int64_t kFewestColumns = 16;      // of a product: a vector
constexpr int64_t kMostRows = 16;           // of a kernel, and of y at a time
constexpr int64_t kPieceElements = 4096;    // of y at a time: they and what they meet stay in the L1 cache
constexpr int64_t kBandElements = 1 << 16;  // of dy for rows of dx: in the L2 cache
constexpr int64_t kSlack = 4;               // values that `gather` reads and writes behind a row

void multiply(const ProductArgs& args) {
  static const auto loop = best_of(&baseline::product<false>, &avx2::product<false>, &avx512::product<false>);
  loop(args);
}
void add_transposed(const ProductArgs& args) {
  static const auto loop = best_of(&baseline::product<true>, &avx2::product<true>, &avx512::product<true>);
  loop(args);
}
void gather(const GatherArgs& args) {
  static const auto loop = best_of(&baseline::gather, &avx2::gather, &avx512::gather);
  loop(args);
}

struct Image {
  int64_t height, width, channels;
  int64_t row() const { return width * channels; }
};

// Of y = w ⋆ x; the kernel, too, has a height and a width.
struct Layer {
  Image x, y, kernel;  // kernel.channels are x's
  int64_t stride, padding, column_stride, column_padding;

  int64_t taps() const { return kernel.row(); }  // of a row of the kernel
  // Rows of the kernel that have a row of x for row r of y.
  std::pair<int64_t, int64_t> inside(int64_t r) const {
    const int64_t start = r * stride - padding;
    const int64_t first = std::clamp<int64_t>(-start, 0, kernel.height);
    return {first, std::clamp(x.height - start, first, kernel.height)};
  }
};

// The rows of x that rows [first, last) of y meet, with zeros where a row has no columns.
class RowsOfX {
 public:
  RowsOfX(const Layer& layer, const float* x, int64_t first, int64_t last)
      : start_(layer.padding - first * layer.stride) {
    thread_local AlignedVector<float> room;
    thread_local std::vector<const float*> rows;
    const int64_t columns = (layer.y.width - 1) * layer.column_stride + layer.kernel.width;
    const int64_t count = (last - 1 - first) * layer.stride + layer.kernel.height;
    float* copy = at_least(room, count * columns * layer.x.channels);
    rows.assign(count, nullptr);
    for (int64_t i = 0; i < count; ++i, copy += columns * layer.x.channels)
      if (const int64_t r = i - start_; r >= 0 && r < layer.x.height)
        rows[i] = between_zeros(layer, x + r * layer.x.row(), columns, copy);
    rows_ = rows.data();
  }
  const float* const* from(int64_t r) const { return rows_ + r + start_; }  // row r of x, and those behind it

 private:
  int64_t start_;
  const float* const* rows_;

  // Columns −column_padding … of a row; a copy if some are not there.
  static const float* between_zeros(const Layer& layer, const float* row, int64_t columns, float* copy) {
    const int64_t first = -layer.column_padding, last = first + columns, channels = layer.x.channels;
    if (first == 0 && last <= layer.x.width) return row;
    const int64_t low = std::clamp<int64_t>(0, first, last), high = std::clamp(layer.x.width, low, last);
    float* to = std::fill_n(copy, (low - first) * channels, 0.f);
    to = std::copy(row + low * channels, row + high * channels, to);
    std::fill_n(to, (last - high) * channels, 0.f);
    return copy;
  }
};

class Narrow final : public RowsConvolution<float> {
 public:
  Narrow(IntArrayRef input, const Tensor& weight, const ConvGeometry& g)
      : sizes_(weight.sizes().vec()),
        weight_(weight.permute({2, 3, 1, 0}).contiguous()),
        transposed_(weight.permute({0, 2, 3, 1}).contiguous()) {
    const auto output = g.output_sizes(input, sizes_);
    layer_ = {.x = {input[2], input[3], input[1]},
              .y = {output[2], output[3], output[1]},
              .kernel = {sizes_[2], sizes_[3], sizes_[1]},
              .stride = g.stride[0],
              .padding = g.padding[0],
              .column_stride = g.stride[1],
              .column_padding = g.padding[2]};
  }

  void forward(const float* x, int64_t first, int64_t last, float* y) const override {
    const Layer& l = layer_;
    for_each_piece(first, last, [&](int64_t begin, int64_t end) {
      const RowsOfX rows(l, x, begin, end);
      for (int64_t r = begin; r < end; ++r) {
        const auto [tap, end_tap] = l.inside(r);
        multiply({.a = rows.from(r * l.stride - l.padding + tap),
                  .segments = end_tap - tap,
                  .depth = l.taps(),
                  .a_stride = l.column_stride * l.x.channels,
                  .b = weight_.const_data_ptr<float>() + tap * l.taps() * l.y.channels,
                  .out = y + (r - first) * l.y.row(),
                  .rows = l.y.width,
                  .columns = l.y.channels});
      }
    });
  }

  void grad_weight(const float* x, const float* dy, int64_t first, int64_t last, float* sums) const override {
    const Layer& l = layer_;
    for_each_piece(first, last, [&](int64_t begin, int64_t end) {
      const RowsOfX rows(l, x, begin, end);
      for (int64_t i = 0; i < l.kernel.height; ++i) {
        const float* met[kMostRows];
        int64_t count = 0, before = begin;  // rows of dy that meet one of x, and the first of them
        for (int64_t r = begin; r < end; ++r) {
          const auto [tap, end_tap] = l.inside(r);
          if (i < tap) before = r + 1;
          if (i >= tap && i < end_tap) met[count++] = *rows.from(r * l.stride - l.padding + i);
        }
        add_transposed({.a = met,
                        .segments = count,
                        .depth = l.y.width,
                        .a_stride = l.column_stride * l.x.channels,
                        .b = dy + (before - first) * l.y.row(),
                        .out = sums + i * l.taps() * l.y.channels,
                        .rows = l.taps(),
                        .columns = l.y.channels});
      }
    });
  }
  Tensor grad_weight_of(const Tensor& sums) const override {
    return sums.view({sizes_[2], sizes_[3], sizes_[1], sizes_[0]}).permute({3, 2, 0, 1});
  }

  void grad_input(const float* dy, int64_t dy_first, int64_t first, int64_t last, float* dx) const override {
    thread_local AlignedVector<float> z_room, line_room;
    const Layer& l = layer_;
    // row of dy that tap i of row r meets, or none
    const auto met = [&](int64_t r, int64_t i) {
      const int64_t at = r + l.padding - i;
      return at >= 0 && at % l.stride == 0 && at / l.stride < l.y.height ? at / l.stride : -1;
    };
    int64_t low = l.y.height, high = 0;
    for (int64_t r = first; r < last; ++r)
      for (int64_t i = 0; i < l.kernel.height; ++i)
        if (const int64_t at = met(r, i); at >= 0) low = std::min(low, at), high = std::max(high, at + 1);
    low = std::min(low, high);
    const int64_t all = l.kernel.height * l.taps(), z_row = l.y.width * all;
    float* const z = at_least(z_room, (high - low) * z_row + kSlack);
    float* const line = at_least(line_room, l.x.row() + kSlack);
    const float* const pixels = dy + (low - dy_first) * l.y.row();
    multiply({.a = &pixels,
              .segments = 1,
              .depth = l.y.channels,
              .a_stride = l.y.channels,
              .b = transposed_.const_data_ptr<float>(),
              .out = z,
              .rows = (high - low) * l.y.width,
              .columns = all});
    for (int64_t r = first; r < last; ++r, dx += l.x.row()) {
      const float* rows[kMostRows];
      int64_t count = 0;
      for (int64_t i = 0; i < l.kernel.height; ++i)
        if (const int64_t at = met(r, i); at >= 0) rows[count++] = z + (at - low) * z_row + i * l.taps();
      gather({.rows = rows,
              .row_count = count,
              .pixel = all,
              .width = l.y.width,
              .channels = l.x.channels,
              .kernel = l.kernel.width,
              .stride = l.column_stride,
              .padding = l.column_padding,
              .out = line,
              .count = l.x.width});
      std::copy_n(line, l.x.row(), dx);
    }
  }

 private:
  std::vector<int64_t> sizes_;
  Tensor weight_, transposed_;  // (kh, kw, C_in, C_out), (C_out, kh, kw, C_in)
  Layer layer_;

  // f(first, last) for pieces of rows of y
  template <class F>
  void for_each_piece(int64_t first, int64_t last, F f) const {
    const int64_t rows = std::clamp<int64_t>(kPieceElements / layer_.y.row(), 1, kMostRows);
    for (int64_t r = first; r < last; r += rows) f(r, std::min(r + rows, last));
  }
};

}  // namespace

namespace {

// By measurements, forward and backward together and each alone, of 2 … 32 to 8 … 64 channels: with more channels in,
// or fewer out, the library is as fast. `like` is x or dy.
bool takes(const Tensor& like, IntArrayRef input, IntArrayRef weight, const ConvGeometry& g) {
  const auto last = at::MemoryFormat::ChannelsLast;
  return like.is_cpu() && like.scalar_type() == at::kFloat && like.numel() > 0 && g.axes() == 2 && g.groups == 1 &&
         !g.pads_explicitly() && g.dilation[0] == 1 && g.dilation[1] == 1 && input[1] > 0 &&
         input[1] <= kMostChannels && weight[0] >= kFewestColumns &&
         weight[1] * weight[2] * weight[3] >= kFewestColumns && weight[2] <= kMostRows &&
         like.suggest_memory_format() == last && like.is_contiguous(last);
}

}  // namespace

bool takes_narrow(const Tensor& input, const Tensor& weight, const ConvGeometry& g) {
  return takes(input, input.sizes(), weight.sizes(), g);
}

bool takes_grad_input_narrow(const Tensor& grad_output, const Tensor& weight, IntArrayRef input,
                             const ConvGeometry& g) {
  return takes(grad_output, input, weight.sizes(), g);
}

Tensor grad_input_narrow(const Tensor& grad_output, const Tensor& weight, IntArrayRef input, const ConvGeometry& g) {
  const Narrow convolution(input, weight, g);
  const Tensor dx = at::empty(input, grad_output.options().memory_format(at::MemoryFormat::ChannelsLast));
  const float* const dy = grad_output.const_data_ptr<float>();
  float* const out = dx.mutable_data_ptr<float>();
  const int64_t height = input[2], row = input[1] * input[3], image = grad_output.numel() / input[0];
  const int64_t bands = std::clamp<int64_t>(image / kBandElements, 1, height);
  at::parallel_for(0, input[0] * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t n = unit / bands, first = unit % bands * height / bands, last = (unit % bands + 1) * height / bands;
      convolution.grad_input(dy + n * image, 0, first, last, out + (n * height + first) * row);
    }
  });
  return dx;
}

std::unique_ptr<RowsConvolution<float>> make_narrow(IntArrayRef input, const Tensor& weight, const ConvGeometry& g) {
  return std::make_unique<Narrow>(input, weight, g);
}

}  // namespace convbn
