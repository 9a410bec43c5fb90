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

// How y's memory is cut up.
struct Blocks {
  bool channels_last;
  int64_t channels, width, run, size, per_run, count;  // runs of `run` elements, each cut into per_run blocks of `size`

  explicit Blocks(const Tensor& y) {
    channels = y.size(1);
    const int64_t plane = y.numel() / std::max<int64_t>(1, y.size(0) * channels);
    channels_last = plane == 1 || channels == 1 || !y.is_contiguous();
    if (channels_last) {  // f rows side by side: width a multiple of 16, at least 64, unless C is wide anyway
      width = channels;
      if (channels < 256) width *= 16 / std::gcd<int64_t>(channels, 16);
      while (width < 64) width *= 2;
      run = y.numel();
      size = std::max(kBlockElements, kMinBlockRows * channels) / width * width;
      size = std::max(size, width);
    } else {
      width = kPlaneWidth;
      run = plane;
      size = kBlockElements;
    }
    per_run = (run + size - 1) / size;
    count = y.numel() / std::max<int64_t>(1, run) * per_run;
  }
  int64_t begin(int64_t block) const { return block / per_run * run + block % per_run * size; }
  int64_t elements(int64_t block) const { return std::min(size, run - block % per_run * size); }
  int64_t values(int64_t block) const { return channels_last ? elements(block) / channels : elements(block); }
  int64_t channel(int64_t block) const { return channels_last ? 0 : block / per_run % channels; }
  int64_t partial_channels() const { return channels_last ? channels : 1; }  // channels per partial result
  int64_t grain() const { return std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, std::min(size, run))); }
};

// Per-channel float64 vectors as the loops want them: one value per column of a block.
template <typename acc>
class Columns {
 public:
  Columns(const Blocks& blocks, const std::vector<double>& channel) : blocks_(blocks) {
    values_.resize(blocks.channels_last ? blocks.width : blocks.channels * kPlaneWidth);
    if (blocks.channels_last)
      for (size_t i = 0; i < values_.size(); ++i) values_[i] = static_cast<acc>(channel[i % blocks.channels]);
    else
      for (size_t i = 0; i < values_.size(); ++i) values_[i] = static_cast<acc>(channel[i / kPlaneWidth]);
  }
  const acc* of(int64_t block) const { return values_.data() + blocks_.channel(block) * kPlaneWidth; }

 private:
  const Blocks& blocks_;
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

// Adds the columns of a block up to its channels.
template <typename acc>
void fold_columns(const acc* columns, int64_t used, int64_t channels, double* sums) {
  std::fill(sums, sums + channels, 0.0);
  for (int64_t i = 0; i < used; i += channels)
    for (int64_t c = 0; c < channels; ++c) sums[c] += columns[i + c];
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
    const int64_t channels = blocks.partial_channels();
    const scalar_t* y_data = data<scalar_t>(y);
    std::vector<double> block_mean(blocks.count * channels), block_m2(blocks.count * channels);
    at::parallel_for(0, blocks.count, blocks.grain(), [&](int64_t first, int64_t last) {
      std::vector<acc> shift(blocks.width), s1(blocks.width), s2(blocks.width);
      std::vector<double> sum(channels), square(channels);
      for (int64_t block = first; block < last; ++block) {
        const scalar_t* x = y_data + blocks.begin(block);
        const int64_t n = blocks.elements(block), used = std::min(n, blocks.width);
        const int64_t fold = blocks.channels_last ? channels : 1;
        const double values = static_cast<double>(blocks.values(block));
        std::fill(s1.begin(), s1.end(), acc(0));
        loops.sum(x, n, blocks.width, s1.data());
        fold_columns(s1.data(), used, fold, sum.data());
        for (int64_t i = 0; i < blocks.width; ++i) shift[i] = static_cast<acc>(sum[i % fold] / values);
        std::fill(s1.begin(), s1.end(), acc(0));
        std::fill(s2.begin(), s2.end(), acc(0));
        loops.moments(x, n, blocks.width, shift.data(), s1.data(), s2.data());
        fold_columns(s1.data(), used, fold, sum.data());
        fold_columns(s2.data(), used, fold, square.data());
        for (int64_t c = 0; c < channels; ++c) {
          block_mean[block * channels + c] = shift[c] + sum[c] / values;
          block_m2[block * channels + c] = square[c] - sum[c] * sum[c] / values;
        }
      }
    });
    const Tensor mean = at::zeros({blocks.channels}, at::kDouble), var = at::zeros({blocks.channels}, at::kDouble);
    double *mean_data = mean.mutable_data_ptr<double>(), *m2 = var.mutable_data_ptr<double>();
    std::vector<double> merged(blocks.channels, 0.0);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const double values = static_cast<double>(blocks.values(block));
      for (int64_t i = 0; i < channels; ++i) {
        const int64_t c = blocks.channel(block) + i;
        const double total = merged[c] + values, delta = block_mean[block * channels + i] - mean_data[c];
        m2[c] += block_m2[block * channels + i] + delta * delta * (merged[c] * values / total);
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
      at::parallel_for(0, blocks.count, blocks.grain(), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t i = blocks.begin(block);
          loop({y + i, at_offset(residual, i), o + i, mean.of(block), scale.of(block), bias.of(block),
                static_cast<acc>(bn.slope)},
               blocks.elements(block), blocks.width);
        }
      });
    });
  }

  template <typename scalar_t>
  struct BackwardColumns {
    using acc = acc_t<scalar_t>;
    SplitMean<acc> split;
    Columns<acc> mean, scale, bias;
    BackwardColumns(const Blocks& blocks, const BnBackward& bn)
        : split(bn.mean),
          mean(blocks, split.rounded),
          scale(blocks, to_vector(bn.scale)),
          bias(blocks, plus_product(to_vector(bn.bias), to_vector(bn.scale), split.rest)) {}
    BackwardArgs<scalar_t> args(const Blocks& blocks, const BnBackward& bn, int64_t block) const {
      const int64_t i = blocks.begin(block);
      BackwardArgs<scalar_t> a{};
      a.grad = data<scalar_t>(bn.grad) + i;
      a.y = data<scalar_t>(bn.y) + i;
      a.residual = at_offset(data<scalar_t>(bn.residual), i);
      a.out = at_offset(data<scalar_t>(bn.out), i);
      a.mean = mean.of(block);
      a.scale = scale.of(block);
      a.bias = bias.of(block);
      a.slope = static_cast<acc>(bn.slope);
      return a;
    }
  };

  static std::tuple<Tensor, Tensor> backward_reduce(const BnBackward& bn) {
    return dispatch(bn.y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      using acc = acc_t<scalar_t>;
      const Blocks blocks(bn.y);
      const int64_t channels = blocks.partial_channels();
      const BackwardColumns<scalar_t> columns(blocks, bn);
      const auto loop = loops.backward_reduce[static_cast<int>(bn.activation)];
      std::vector<double> block_g(blocks.count * channels), block_gd(blocks.count * channels);
      at::parallel_for(0, blocks.count, blocks.grain(), [&](int64_t first, int64_t last) {
        std::vector<acc> g(blocks.width), gd(blocks.width);
        for (int64_t block = first; block < last; ++block) {
          std::fill(g.begin(), g.end(), acc(0));
          std::fill(gd.begin(), gd.end(), acc(0));
          auto args = columns.args(blocks, bn, block);
          args.sum_g = g.data();
          args.sum_gd = gd.data();
          const int64_t n = blocks.elements(block), used = std::min(n, blocks.width);
          loop(args, n, blocks.width);
          fold_columns(g.data(), used, channels, &block_g[block * channels]);
          fold_columns(gd.data(), used, channels, &block_gd[block * channels]);
        }
      });
      const Tensor sum_g = at::zeros({blocks.channels}, at::kDouble),
                   sum_gd = at::zeros({blocks.channels}, at::kDouble);
      double *g = sum_g.mutable_data_ptr<double>(), *gd = sum_gd.mutable_data_ptr<double>();
      for (int64_t block = 0; block < blocks.count; ++block)
        for (int64_t i = 0; i < channels; ++i) {
          g[blocks.channel(block) + i] += block_g[block * channels + i];
          gd[blocks.channel(block) + i] += block_gd[block * channels + i];
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
      at::parallel_for(0, blocks.count, blocks.grain(), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          auto args = columns.args(blocks, bn, block);
          args.a = a_columns.of(block);
          args.b = b_columns.of(block);
          args.c = c_columns.of(block);
          args.grad_y = dy + blocks.begin(block);
          args.grad_residual = at_offset(dr, blocks.begin(block));
          loop(args, blocks.elements(block), blocks.width);
        }
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
      at::parallel_for(0, blocks.count, blocks.grain(), [&](int64_t first, int64_t last) {
        for (int64_t block = first; block < last; ++block) {
          const int64_t i = blocks.begin(block);
          loops.invert({o + i, at_offset(residual, i), y_data + i, mean.of(block), inverse_scale.of(block),
                        bias.of(block), static_cast<acc>(inverse_slope)},
                       blocks.elements(block), blocks.width);
        }
      });
    });
    return y;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CPU, m) {
  m.impl("conv_bn_forward", &conv_bn_forward<CpuKernels>);
  m.impl("conv_bn_backward", &conv_bn_backward<CpuKernels>);
}

}  // namespace convbn
