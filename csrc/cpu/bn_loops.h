// Inner loops of batch normalisation on a CPU, compiled once per instruction set (bn_loops_*.cpp) and chosen once.
//
// Elements are seen as rows `width` wide (the last row may be cut short) with parameters and sums per column, or, where
// width is 1, as planes with one set of parameters each and kPlaneWidth partial sums:
//   channels_last (M, C):       width = f·C, f rows side by side, so that narrow or odd C still fill vectors
//   contiguous (N, C, large S): planes
//   contiguous (N, C, small S): a row per sample that holds the planes of some channels, S columns to each
#pragma once
#include <cstdint>

#include "activation.h"

namespace convbn {

constexpr int64_t kPlaneWidth = 16;

// Rows, or `runs` planes that follow each other in memory.
struct Span {
  int64_t elements, width, runs;  // elements of one run; rows are one run
  int64_t stride;                 // from row to row
};

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Arithmetic and per-channel parameters: float, but double for double.
template <typename scalar_t>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <typename scalar_t>
using acc_t = typename accumulate<scalar_t>::type;

// out = act((y − mean)·scale + bias + residual); residual may be null, out may be y
template <typename scalar_t>
struct ApplyArgs {
  const scalar_t *y, *residual;
  scalar_t* out;
  const acc_t<scalar_t>*mean, *scale, *bias;
  acc_t<scalar_t> slope;
};

// g = grad · act′(v), where v = (y − mean)·scale + bias + residual, or, where its sign is enough, v = out
//   reduce:  sum_g += g,  sum_gd += g·(y − mean)
//   apply:   grad_y = a·g + b·(y − mean) + c;  grad_residual = g if wanted
template <typename scalar_t>
struct BackwardArgs {
  const scalar_t *grad, *y, *residual, *out;
  const acc_t<scalar_t>*mean, *scale, *bias;
  acc_t<scalar_t> slope;
  acc_t<scalar_t>*sum_g, *sum_gd;
  const acc_t<scalar_t>*a, *b, *c;
  scalar_t *grad_y, *grad_residual;
};

// y = (act⁻¹(out) − residual − bias)·inverse_scale + mean, for identity and leaky_relu (slope > 0)
template <typename scalar_t>
struct InvertArgs {
  const scalar_t *out, *residual;
  scalar_t* y;
  const acc_t<scalar_t>*mean, *inverse_scale, *bias;
  acc_t<scalar_t> inverse_slope;
};

template <typename scalar_t>
struct BnLoops {
  using acc = acc_t<scalar_t>;
  void (*sum)(const scalar_t* x, const Span& span, acc* sums);
  // s1 += x − shift, s2 += (x − shift)²
  void (*moments)(const scalar_t* x, const Span& span, const acc* shift, acc* s1, acc* s2);
  void (*apply[kActivations])(const ApplyArgs<scalar_t>&, const Span& span);
  void (*backward_reduce[kActivations])(const BackwardArgs<scalar_t>&, const Span& span);
  void (*backward_apply[kActivations])(const BackwardArgs<scalar_t>&, const Span& span);
  void (*invert)(const InvertArgs<scalar_t>&, const Span& span);
};

// One table per instruction set, each defined by its own bn_loops_*.cpp.
struct BnLoopTables {
  BnLoops<double> f64;
  BnLoops<float> f32;
  BnLoops<bf16> b16;
  BnLoops<f16> h16;
};
extern const BnLoopTables bn_loops_baseline, bn_loops_avx2, bn_loops_avx512;

}  // namespace convbn
