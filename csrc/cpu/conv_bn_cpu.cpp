// Batch normalisation on the CPU: which block of memory goes to which loop, and how partial sums are merged.
//
// y is cut into blocks whose number and size depend on its shape alone, each small enough to stay in the L2 cache for
// the two passes of its statistics. Blocks run on any thread; their results are merged in order, in float64, so nothing
// depends on the number of threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../batch_norm.h"
#include "../conv_bn.h"
#include "bn_cpu.h"
#include "inference.h"
#include "isa.h"
#include "pool.h"
#include "rows_convolution.h"
#include "stream.h"

namespace convbn {

const BnLoopTables& loop_tables() {
#if defined(__x86_64__)
  static const BnLoopTables& tables = *best_of(&bn_loops_baseline, &bn_loops_avx2, &bn_loops_avx512);
  return tables;
#else
  return bn_loops_baseline;
#endif
}

namespace {

using at::Tensor;

constexpr int64_t kPieceElements = 4096;

struct CpuKernels {
  static std::tuple<Tensor, Tensor> statistics(const Tensor& y) {
    return dispatch(y, [&]<typename scalar_t>(scalar_t, const BnLoops<scalar_t>& loops) {
      return moments(y, Blocks(y), loops, [&](const Blocks::Block&) { return data<scalar_t>(y); });
    });
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
      const auto slope = static_cast<acc>(bn.slope);
      const bool rows = blocks.per_plane > 1;  // else planes: it would not pay
      const bool streams = rows && o != y && out.nbytes() >= kStreamBytes;
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) {
        thread_local AlignedVector<scalar_t> piece;
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          const auto apply = [&](int64_t at, scalar_t* to, const Span& part) {
            loop({y + at, at_offset(residual, at), to, mean.of(p), scale.of(p), bias.of(p), slope}, part);
          };
          if (!streams) return apply(i, o + i, span);
          // a piece at a time in the L1 cache
          const int64_t most = std::max<int64_t>(1, kPieceElements / span.width) * span.width;
          piece.resize(most);
          for (int64_t done = 0; done < span.elements; done += most) {
            const int64_t elements = std::min(most, span.elements - done);
            apply(i + done, piece.data(), Span{elements, span.width, 1, span.stride});
            stream_copy(o + i + done, piece.data(), elements * sizeof(scalar_t));
          }
        });
      });
    });
  }

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
      const Blocks blocks(bn.y);
      const GradientColumns<scalar_t> columns(blocks, bn, a, b, c);
      const auto loop = loops.backward_apply[static_cast<int>(bn.activation)];
      scalar_t *dy = mutable_data<scalar_t>(grad_y), *dr = mutable_data<scalar_t>(grad_residual);
      blocks.parallel_for_each([&](const Blocks::Block& b, int64_t) {
        blocks.for_each_span(b, [&](int64_t i, const Span& span, int64_t p) {
          loop(columns.args(i, p, dy + i, at_offset(dr, i)), span);
        });
      });
    });
  }

  static bool own_convolution(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry) {
    return own_rows_convolution(input, weight, geometry);
  }
  static Tensor convolve(const Tensor& input, const Tensor& weight, const ConvGeometry& geometry, Tensor* mean,
                         Tensor* var) {
    return convolve_rows(input, weight, geometry, mean, var);
  }
  static std::tuple<Tensor, Tensor> convolve_backward(const BnBackward& bn, const Tensor& a, const Tensor& b,
                                                      const Tensor& c, const Tensor& input, const Tensor& weight,
                                                      const ConvGeometry& geometry, bool needs_input, bool needs_weight,
                                                      const Tensor& grad_residual) {
    return convolve_rows_backward(bn, a, b, c, input, weight, geometry, needs_input, needs_weight, grad_residual);
  }

  // The weight's rows are planes with a scale each.
  static Tensor infer(const Tensor& input, const Tensor& weight, const BnForward& bn, const OptionalTensor& residual,
                      const ConvBnOptions& options) {
    if (library_needs_float(input, weight.sizes(), options.geometry.output_sizes(input.sizes(), weight.sizes()))) {
      const auto unfilled = [](const Tensor& t) { return at::empty_like(t, at::kFloat); };
      if (!fuses(unfilled(input), unfilled(weight), residual.has_value(), options)) return {};
      const OptionalTensor added = residual ? OptionalTensor(residual->to(at::kFloat)) : std::nullopt;
      return infer(input.to(at::kFloat), weight.to(at::kFloat), bn, added, options).to(input.scalar_type());
    }
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
