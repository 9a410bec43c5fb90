// Batch normalisation on the CPU: which block of memory goes to which loop, and how partial sums are merged.
//
// y is cut into blocks whose number and size depend on its shape alone, each small enough to stay in the L2 cache for
// the two passes of its statistics. Blocks run on any thread; their results are merged in order, in float64, so nothing
// depends on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "../batch_norm.h"
#include "../conv_bn.h"
#include "bn_blocks.h"
#include "inference.h"
#include "pool.h"

namespace convbn {

namespace {

using at::Tensor;

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

Tensor zeros(int64_t channels) {  // in float64, without an operator that fills
  const Tensor result = at::empty({channels}, at::kDouble);
  std::fill_n(result.mutable_data_ptr<double>(), channels, 0.0);
  return result;
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
      thread_local AlignedVector<acc> shift, s1, s2;
      thread_local std::vector<double> sum, square;
      const int64_t channels = b.planes * blocks.per_plane, columns = b.planes * width;
      const int64_t parameters = blocks.parameters;
      const double values = static_cast<double>(blocks.values(b));
      sum.resize(stride), square.resize(stride), shift.resize(blocks.most_parameters());
      s1.assign(columns, 0);
      blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t) { loops.sum(y_data + i, span, s1.data()); });
      fold_columns(blocks, b, s1.data(), sum.data());
      for (int64_t p = 0; p < b.planes; ++p)
        for (int64_t i = 0; i < parameters; i += blocks.per_plane)
          for (int64_t c = 0; c < blocks.per_plane; ++c)
            shift[p * parameters + i + c] = static_cast<acc>(sum[p * blocks.per_plane + c] / values);
      s1.assign(columns, 0);
      s2.assign(columns, 0);
      blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t) {
        loops.moments(y_data + i, span, shift.data(), s1.data(), s2.data());
      });
      fold_columns(blocks, b, s1.data(), sum.data());
      fold_columns(blocks, b, s2.data(), square.data());
      for (int64_t c = 0; c < channels; ++c) {
        const double start = shift[c / blocks.per_plane * parameters + c % blocks.per_plane];
        block_mean[index * stride + c] = start + sum[c] / values;
        block_m2[index * stride + c] = square[c] - sum[c] * sum[c] / values;
      }
    });
    const Tensor mean = zeros(blocks.channels), var = zeros(blocks.channels);
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
        thread_local AlignedVector<acc> g, gd;
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
      const Tensor sum_g = zeros(blocks.channels), sum_gd = zeros(blocks.channels);
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

  // The weight's rows are planes with a scale each.
  static Tensor infer(const Tensor& input, const Tensor& weight, const BnForward& bn, const OptionalTensor& residual,
                      const ConvBnOptions& options) {
    if (!fuses(input, weight, residual.has_value(), options)) return {};
    const int64_t rows = weight.size(0), row = weight.numel() / rows;
    const Tensor w = dense(weight), folded = at::empty_like(w);
    dispatch(w, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      const auto scale_vector = to_vector(bn.scale);
      const std::vector<acc_t<scalar_t>> zero(rows, 0), scale(scale_vector.begin(), scale_vector.end());
      const auto loop = loops.apply[static_cast<int>(Activation::identity)];
      at::parallel_for(0, rows, std::max<int64_t>(1, kBlockElements / row), [&](int64_t first, int64_t last) {
        loop({data<scalar_t>(w) + first * row, nullptr, mutable_data<scalar_t>(folded) + first * row, &zero[first],
              &scale[first], &zero[first], 0},
             Span{row, 1, last - first, 1});
      });
    });
    return fused_convolution(input, folded, folded_bias(bn, weight.scalar_type()), residual, options);
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

// f with its large tensors from the pool
template <auto f>
struct pooled;
template <class Result, class... Args, Result (*f)(Args...)>
struct pooled<f> {
  static Result call(Args... args) {
    const PoolScope scope;
    return f(args...);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(convbn_ext, CPU, m) {
  m.impl("conv_bn_forward", &pooled<&conv_bn_forward<CpuKernels>>::call);
  m.impl("conv_bn_backward", &pooled<&conv_bn_backward<CpuKernels>>::call);
  m.impl("conv_bn_backward_", &pooled<&conv_bn_backward<CpuKernels, /*overwrite_y=*/true>>::call);
  m.impl("bn_statistics", &pooled<&bn_statistics<CpuKernels>>::call);
  m.impl("bn_apply", &pooled<&bn_apply<CpuKernels>>::call);
  m.impl("bn_backward_reduce", &pooled<&bn_backward_reduce<CpuKernels>>::call);
  m.impl("bn_backward_apply", &pooled<&bn_backward_apply<CpuKernels>>::call);
}

}  // namespace convbn
