// Batch normalisation on the CPU: which block of memory goes to which loop, and how partial sums are merged.
//
// y is cut into blocks whose number and size depend on its shape alone, each small enough to stay in the L2 cache for
// the two passes of its statistics. Blocks run on any thread; their results are merged in order, in float64, so nothing
// depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <numeric>

#include "../conv_bn.h"
#include "bn_loops.h"

namespace convbn {

namespace {

using at::Tensor;

constexpr int64_t kBlockElements = 32768;
constexpr int64_t kMinBlockRows = 64;  // rows of C channels that share one partial result

const BnLoopTables& loop_tables() {
  static const BnLoopTables& tables = []() -> const BnLoopTables& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return bn_loops_avx512;
    if (capability.rfind("AVX2", 0) == 0) return bn_loops_avx2;
#endif
    return bn_loops_baseline;
  }();
  return tables;
}

// Calls f with a value of the loop's element type for y's dtype.
template <class F>
auto dispatch(const Tensor& y, F f) {
  switch (y.scalar_type()) {
    case at::kDouble:
      return f(double{}, loop_tables().f64);
    case at::kFloat:
      return f(float{}, loop_tables().f32);
    case at::kBFloat16:
      return f(bf16{}, loop_tables().b16);
    default:
      return f(f16{}, loop_tables().h16);
  }
}

template <typename scalar_t>
const scalar_t* data(const Tensor& t) {
  return t.defined() ? static_cast<const scalar_t*>(t.const_data_ptr()) : nullptr;
}
template <typename scalar_t>
scalar_t* mutable_data(const Tensor& t) {
  return t.defined() ? static_cast<scalar_t*>(t.mutable_data_ptr()) : nullptr;
}

// Pointer arithmetic that leaves "no tensor" alone.
template <class T>
T* at_offset(T* p, int64_t i) {
  return p ? p + i : nullptr;
}

// How y's memory is cut up: N samples of P planes of S consecutive elements, an element's parameters repeating with
// `width`. A contiguous y has a plane per channel; a channels_last y is one plane of rows that hold all channels.
// A block is some samples × some planes × some elements, small enough for the cache and cut by y's shape alone.
class Blocks {
 public:
  struct Block {
    int64_t sample, samples, plane, planes, element, elements;
  };

  explicit Blocks(const Tensor& y) {
    channels = y.size(1);
    N_ = y.size(0), P_ = channels, S_ = y.numel() / std::max<int64_t>(1, N_ * P_);
    if (S_ == 1 || P_ == 1 || !y.is_contiguous()) {  // channels_last, also where both layouts are the same
      N_ = P_ = 1, S_ = y.numel();
      per_plane = width = channels;
      if (channels < 256) width *= 16 / std::gcd<int64_t>(channels, 16);  // odd C: rows side by side fill the vectors
      while (width < 64) width *= 2;
      elements_ = std::max(width, std::max(kBlockElements, kMinBlockRows * channels) / width * width);
    } else {
      elements_ = std::max(kBlockElements, width);
    }
    elements_ = std::max<int64_t>(1, std::min(elements_, S_));
    planes_ = std::clamp<int64_t>(kBlockElements / elements_, 1, P_);
    samples_ = planes_ < P_ ? 1 : std::clamp<int64_t>(kBlockElements / (elements_ * P_), 1, std::max<int64_t>(1, N_));
    count = pieces(N_, samples_) * pieces(P_, planes_) * pieces(S_, elements_);
  }

  int64_t channels, count;
  int64_t width = kPlaneWidth;  // columns that a plane's rows have
  int64_t per_plane = 1;        // channels among them

  Block operator[](int64_t i) const {
    const int64_t along = pieces(S_, elements_), across = pieces(P_, planes_);
    Block b;
    b.element = i % along * elements_;
    b.plane = i / along % across * planes_;
    b.sample = i / along / across * samples_;
    b.elements = std::min(elements_, S_ - b.element);
    b.planes = std::min(planes_, P_ - b.plane);
    b.samples = std::min(samples_, N_ - b.sample);
    return b;
  }
  // f(first element, span, first plane) for every stretch of consecutive elements, in memory order
  template <class F>
  void for_each_span(const Block& b, F f) const {
    // more than one plane in a block means whole planes, which follow each other
    for (int64_t n = b.sample; n < b.sample + b.samples; ++n)
      f((n * P_ + b.plane) * S_ + b.element, Span{b.elements, width, b.planes}, b.plane);
  }
  // f(block) for all blocks, on all threads
  template <class F>
  void parallel_for_each(F f) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) f((*this)[i], i);
    });
  }
  int64_t values(const Block& b) const { return b.samples * b.elements / per_plane; }  // per channel
  int64_t most_channels() const { return planes_ * per_plane; }                        // in one block
  int64_t most_columns() const { return planes_ * width; }

 private:
  int64_t N_, P_, S_, samples_, planes_, elements_;
  static int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
};

// Per-channel float64 vectors as the loops want them: one value per column.
template <typename acc>
class Columns {
 public:
  Columns(const Blocks& blocks, const std::vector<double>& channel)
      : width_(blocks.width), values_(blocks.channels / blocks.per_plane * blocks.width) {
    for (size_t i = 0; i < values_.size();)
      if (blocks.per_plane == 1) {
        const auto value = static_cast<acc>(channel[i / width_]);
        for (int64_t k = 0; k < width_; ++k) values_[i++] = value;
      } else {
        for (int64_t c = 0; c < blocks.channels; ++c) values_[i++] = static_cast<acc>(channel[c]);
      }
  }
  const acc* of(int64_t plane) const { return values_.data() + plane * width_; }

 private:
  int64_t width_;
  std::vector<acc> values_;
};

std::vector<double> to_vector(const Tensor& t) {
  const Tensor d = t.to(at::kDouble).contiguous();
  return {d.const_data_ptr<double>(), d.const_data_ptr<double>() + d.numel()};
}

// The mean rounded to the arithmetic of the loops, and what the rounding left: y − μ = (y − rounded) + rest.
// With mean ≫ std the rest matters, and it is free: it goes into the additive parameter of each formula.
template <typename acc>
struct SplitMean {
  std::vector<double> rounded, rest;
  explicit SplitMean(const Tensor& mean) : rounded(to_vector(mean)), rest(rounded.size()) {
    for (size_t c = 0; c < rounded.size(); ++c) {
      const double exact = rounded[c];
      rounded[c] = static_cast<double>(static_cast<acc>(exact));
      rest[c] = rounded[c] - exact;
    }
  }
};

std::vector<double> plus_product(std::vector<double> sum, const std::vector<double>& a, const std::vector<double>& b) {
  for (size_t c = 0; c < sum.size(); ++c) sum[c] += a[c] * b[c];
  return sum;
}

// Adds the columns of a block's planes up to its channels; a plane of fewer elements than columns leaves the rest
// unused.
template <typename acc>
void fold_columns(const Blocks& blocks, const Blocks::Block& b, const acc* columns, double* sums) {
  std::fill(sums, sums + b.planes * blocks.per_plane, 0.0);
  const int64_t used = std::min(b.elements, blocks.width);
  for (int64_t p = 0; p < b.planes; ++p) {
    const acc* column = columns + p * blocks.width;
    if (blocks.per_plane == 1) {  // four chains of additions instead of one
      double chain[4] = {};
      for (int64_t i = 0; i < used; ++i) chain[i % 4] += column[i];
      sums[p] = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    } else {
      for (int64_t i = 0; i < used; i += blocks.per_plane)
        for (int64_t c = 0; c < blocks.per_plane; ++c) sums[p * blocks.per_plane + c] += column[i + c];
    }
  }
}

struct CpuKernels {
  static std::tuple<Tensor, Tensor> statistics(const Tensor& y) {
    return dispatch(y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) { return moments(y, loops); });
  }

  // Per block: mean, then sums of d = y − mean and d²; blocks are merged by  M₂ = M₂ₐ + M₂ᵦ + δ²·nₐnᵦ/(nₐ + nᵦ)
  template <typename scalar_t>
  static std::tuple<Tensor, Tensor> moments(const Tensor& y, const BnLoops<scalar_t>& loops) {
    using acc = acc_t<scalar_t>;
    const Blocks blocks(y);
    const int64_t stride = blocks.most_channels(), width = blocks.width;
    const scalar_t* y_data = data<scalar_t>(y);
    std::vector<double> block_mean(blocks.count * stride), block_m2(blocks.count * stride);
    blocks.parallel_for_each([&](const Blocks::Block& b, int64_t index) {
      thread_local std::vector<acc> shift, s1, s2;
      thread_local std::vector<double> sum, square;
      const int64_t channels = b.planes * blocks.per_plane, columns = b.planes * width;
      const double values = static_cast<double>(blocks.values(b));
      sum.resize(stride), square.resize(stride), shift.resize(blocks.most_columns());
      s1.assign(columns, 0);
      blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t) { loops.sum(y_data + i, span, s1.data()); });
      fold_columns(blocks, b, s1.data(), sum.data());
      for (int64_t p = 0; p < b.planes; ++p)
        for (int64_t i = 0; i < width; i += blocks.per_plane)
          for (int64_t c = 0; c < blocks.per_plane; ++c)
            shift[p * width + i + c] = static_cast<acc>(sum[p * blocks.per_plane + c] / values);
      s1.assign(columns, 0);
      s2.assign(columns, 0);
      blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t) {
        loops.moments(y_data + i, span, shift.data(), s1.data(), s2.data());
      });
      fold_columns(blocks, b, s1.data(), sum.data());
      fold_columns(blocks, b, s2.data(), square.data());
      for (int64_t c = 0; c < channels; ++c) {
        const double start = shift[c / blocks.per_plane * width + c % blocks.per_plane];
        block_mean[index * stride + c] = start + sum[c] / values;
        block_m2[index * stride + c] = square[c] - sum[c] * sum[c] / values;
      }
    });
    const Tensor mean = at::zeros({blocks.channels}, at::kDouble), var = at::zeros({blocks.channels}, at::kDouble);
    double *mean_data = mean.mutable_data_ptr<double>(), *m2 = var.mutable_data_ptr<double>();
    std::vector<double> merged(blocks.channels, 0.0);
    for (int64_t index = 0; index < blocks.count; ++index) {
      const Blocks::Block b = blocks[index];
      const double values = static_cast<double>(blocks.values(b));
      for (int64_t i = 0; i < b.planes * blocks.per_plane; ++i) {
        const int64_t c = b.plane * blocks.per_plane + i;
        const double total = merged[c] + values, delta = block_mean[index * stride + i] - mean_data[c];
        m2[c] += block_m2[index * stride + i] + delta * delta * (merged[c] * values / total);
        mean_data[c] += delta * (values / total);
        merged[c] = total;
      }
    }
    for (int64_t c = 0; c < blocks.channels; ++c) m2[c] = std::max(0.0, m2[c]) / merged[c];
    return {mean, var};
  }

  static void apply(const BnForward& bn, const Tensor& out) {
    dispatch(bn.y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      using acc = acc_t<scalar_t>;
      const Blocks blocks(bn.y);
      const SplitMean<acc> split(bn.mean);
      const auto scale_vector = to_vector(bn.scale);
      const Columns<acc> mean(blocks, split.rounded), scale(blocks, scale_vector);
      const Columns<acc> bias(blocks, plus_product(to_vector(bn.bias), scale_vector, split.rest));
      const auto loop = loops.apply[static_cast<int>(bn.activation)];
      const scalar_t *y = data<scalar_t>(bn.y), *residual = data<scalar_t>(bn.residual);
      scalar_t* o = mutable_data<scalar_t>(out);
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) {
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          loop({y + i, at_offset(residual, i), o + i, mean.of(p), scale.of(p), bias.of(p), static_cast<acc>(bn.slope)},
               span);
        });
      });
    });
  }

  // The arguments that both backward loops share: pointers to the start of the tensors and the columns of all planes.
  template <typename scalar_t>
  struct BackwardColumns {
    using acc = acc_t<scalar_t>;
    SplitMean<acc> split;
    Columns<acc> mean, scale, bias;
    BackwardArgs<scalar_t> start{};
    BackwardColumns(const Blocks& blocks, const BnBackward& bn)
        : split(bn.mean),
          mean(blocks, split.rounded),
          scale(blocks, to_vector(bn.scale)),
          bias(blocks, plus_product(to_vector(bn.bias), to_vector(bn.scale), split.rest)) {
      start.grad = data<scalar_t>(bn.grad);
      start.y = data<scalar_t>(bn.y);
      start.residual = data<scalar_t>(bn.residual);
      start.out = data<scalar_t>(bn.out);
      start.slope = static_cast<acc>(bn.slope);
    }
    BackwardArgs<scalar_t> args(int64_t i, int64_t plane) const {
      BackwardArgs<scalar_t> a = start;
      a.grad += i;
      a.y += i;
      a.residual = at_offset(a.residual, i);
      a.out = at_offset(a.out, i);
      a.mean = mean.of(plane);
      a.scale = scale.of(plane);
      a.bias = bias.of(plane);
      return a;
    }
  };

  static std::tuple<Tensor, Tensor> backward_reduce(const BnBackward& bn) {
    return dispatch(bn.y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      using acc = acc_t<scalar_t>;
      const Blocks blocks(bn.y);
      const int64_t stride = blocks.most_channels(), width = blocks.width;
      const BackwardColumns<scalar_t> columns(blocks, bn);
      const auto loop = loops.backward_reduce[static_cast<int>(bn.activation)];
      std::vector<double> block_g(blocks.count * stride), block_gd(blocks.count * stride);
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t index) {
        thread_local std::vector<acc> g, gd;
        g.assign(b.planes * width, 0);
        gd.assign(b.planes * width, 0);
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          auto args = columns.args(i, p);
          args.sum_g = g.data();
          args.sum_gd = gd.data();
          loop(args, span);
        });
        fold_columns(blocks, b, g.data(), &block_g[index * stride]);
        fold_columns(blocks, b, gd.data(), &block_gd[index * stride]);
      });
      const Tensor sum_g = at::zeros({blocks.channels}, at::kDouble),
                   sum_gd = at::zeros({blocks.channels}, at::kDouble);
      double *g = sum_g.mutable_data_ptr<double>(), *gd = sum_gd.mutable_data_ptr<double>();
      for (int64_t index = 0; index < blocks.count; ++index) {
        const Blocks::Block b = blocks[index];
        for (int64_t i = 0; i < b.planes * blocks.per_plane; ++i) {
          g[b.plane * blocks.per_plane + i] += block_g[index * stride + i];
          gd[b.plane * blocks.per_plane + i] += block_gd[index * stride + i];
        }
      }
      for (int64_t c = 0; c < blocks.channels; ++c) gd[c] += columns.split.rest[c] * g[c];
      return std::make_tuple(sum_g, sum_gd);
    });
  }

  static void backward_apply(const BnBackward& bn, const Tensor& a, const Tensor& b, const Tensor& c,
                             const Tensor& grad_y, const Tensor& grad_residual) {
    dispatch(bn.y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      using acc = acc_t<scalar_t>;
      const Blocks blocks(bn.y);
      const BackwardColumns<scalar_t> columns(blocks, bn);
      const auto b_vector = to_vector(b);
      const Columns<acc> a_columns(blocks, to_vector(a)), b_columns(blocks, b_vector);
      const Columns<acc> c_columns(blocks, plus_product(to_vector(c), b_vector, columns.split.rest));
      const auto loop = loops.backward_apply[static_cast<int>(bn.activation)];
      scalar_t *dy = mutable_data<scalar_t>(grad_y), *dr = mutable_data<scalar_t>(grad_residual);
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) {
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          auto args = columns.args(i, p);
          args.a = a_columns.of(p);
          args.b = b_columns.of(p);
          args.c = c_columns.of(p);
          args.grad_y = dy + i;
          args.grad_residual = at_offset(dr, i);
          loop(args, span);
        });
      });
    });
  }

  static Tensor invert(const BnForward& bn, const Tensor& out) {
    const Tensor y = at::empty_like(out);
    dispatch(out, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      using acc = acc_t<scalar_t>;
      const Blocks blocks(out);
      const Columns<acc> mean(blocks, to_vector(bn.mean)), bias(blocks, to_vector(bn.bias));
      const Columns<acc> inverse_scale(blocks, to_vector(bn.scale.reciprocal()));
      const double inverse_slope = bn.activation == Activation::leaky_relu ? 1 / bn.slope : 1;
      const scalar_t *o = data<scalar_t>(out), *residual = data<scalar_t>(bn.residual);
      scalar_t* y_data = mutable_data<scalar_t>(y);
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) {
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          loops.invert({o + i, at_offset(residual, i), y_data + i, mean.of(p), inverse_scale.of(p), bias.of(p),
                        static_cast<acc>(inverse_slope)},
                       span);
        });
      });
    });
    return y;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CPU, m) {
  m.impl("conv_bn_forward", &conv_bn_forward<CpuKernels>);
  m.impl("conv_bn_backward", &conv_bn_backward<CpuKernels>);
  m.impl("conv_bn_backward_", &conv_bn_backward<CpuKernels, /*overwrite_y=*/true>);
}

}  // namespace convbn
