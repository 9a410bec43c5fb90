// What the passes of batch normalisation on the CPU share: the loops of a dtype, statistics by blocks, and the
// arguments of the backward loops.
#pragma once
#include <tuple>

#include "bn_blocks.h"

namespace convbn {

const BnLoopTables& loop_tables();  // for this CPU

// Calls f with a value of the loop's element type for y's dtype.
template <class F>
auto dispatch(const at::Tensor& y, F f) {
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
const scalar_t* data(const at::Tensor& t) {
  return t.defined() ? static_cast<const scalar_t*>(t.const_data_ptr()) : nullptr;
}
template <typename scalar_t>
scalar_t* mutable_data(const at::Tensor& t) {
  return t.defined() ? static_cast<scalar_t*>(t.mutable_data_ptr()) : nullptr;
}

// Pointer arithmetic that leaves "no tensor" alone.
template <class T>
T* at_offset(T* p, int64_t i) {
  return p ? p + i : nullptr;
}

inline at::Tensor zeros(int64_t channels) {  // in float64, without an operator that fills
  const at::Tensor result = at::empty({channels}, at::kDouble);
  std::fill_n(result.mutable_data_ptr<double>(), channels, 0.0);
  return result;
}

// μ and σ² of y, float64. Per block: mean, then sums of d = y − mean and d²; blocks are merged by
//   M₂ = M₂ₐ + M₂ᵦ + δ²·nₐnᵦ/(nₐ + nᵦ)
// elements(block), y's data or a copy of this block's, is indexed as y's data is; it may write the block first.
template <typename scalar_t, class F>
std::tuple<at::Tensor, at::Tensor> moments(const at::Tensor& y, const Blocks& blocks, const BnLoops<scalar_t>& loops,
                                           F elements) {
  using acc = acc_t<scalar_t>;
  const int64_t stride = blocks.most_channels(), width = blocks.width;
  std::vector<double> block_mean(blocks.count * stride), block_m2(blocks.count * stride);
  blocks.parallel_for_each([&](const Blocks::Block& b, int64_t index) {
    thread_local AlignedVector<acc> shift, s1, s2;
    thread_local std::vector<double> sum, square;
    const int64_t channels = b.planes * blocks.per_plane, columns = b.planes * width;
    const int64_t parameters = blocks.parameters;
    const double values = static_cast<double>(blocks.values(b));
    const scalar_t* const y_data = elements(b);
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
  const at::Tensor mean = zeros(blocks.channels), var = zeros(blocks.channels);
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

// Those of dy = a·g + b·(y − μ) + c besides.
template <typename scalar_t>
struct GradientColumns {
  using acc = acc_t<scalar_t>;
  BackwardColumns<scalar_t> shared;
  std::vector<double> b_vector;
  Columns<acc> a, b, c;
  GradientColumns(const Blocks& blocks, const BnBackward& bn, const at::Tensor& a, const at::Tensor& b,
                  const at::Tensor& c)
      : shared(blocks, bn),
        b_vector(to_vector(b)),
        a(blocks, to_vector(a)),
        b(blocks, b_vector),
        c(blocks, plus_product(to_vector(c), b_vector, shared.split.rest)) {}
  BackwardArgs<scalar_t> args(int64_t i, int64_t plane, scalar_t* grad_y, scalar_t* grad_residual) const {
    BackwardArgs<scalar_t> args = shared.args(i, plane);
    args.a = a.of(plane);
    args.b = b.of(plane);
    args.c = c.of(plane);
    args.grad_y = grad_y;
    args.grad_residual = grad_residual;
    return args;
  }
};

}  // namespace convbn
