// How both memory layouts become one matrix of packs, and how blocks of threads cover it.
//
//   channels_last (M, C):   f = V/gcd(V, C) rows side by side make rows of f·C scalars,
//                           a whole number of packs for every C;
//                           column j belongs to channel j mod C. The last row may be cut short.
//   contiguous (N, C, S):   N·C rows of S scalars; row r belongs to channel r mod C.
//                           Packs where V divides S, else V = 1.
// A block is threads_x packs wide and threads_y rows high.
#pragma once
#include <numeric>

#include "bn.h"
#include "pack.cuh"

namespace convbn {

constexpr int kThreads = 256;
// Blocks that must fit on a multiprocessor: two keep enough loads in flight. float64 needs the registers more.
template <typename scalar_t>
constexpr int kResident = sizeof(scalar_t) == 8 ? 1 : 2;
constexpr int64_t kBlocks =
    1024;  // about what fills the largest card once; fixed, so that sums do not depend on the card
constexpr int64_t kRowsPerThread = 4;  // at least, before another block is worth its partial result

struct Matrix {
  int64_t size, rows;            // scalars in all (only the last row of channels_last is not full), rows
  int width, channels, stacked;  // scalars per row, C, f
  int threads_x, threads_y;

  int packs(int V) const { return (width + V - 1) / V; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Scalars per pack: 16 bytes if every tensor allows it.
inline int pack_size(const BnProblem& p, int whole, std::initializer_list<const void*> more = {}) {
  bool aligned = aligned16(p.y) && aligned16(p.residual) && aligned16(p.grad) && aligned16(p.out);
  for (const void* pointer : more) aligned = aligned && aligned16(pointer);
  return aligned && (p.channels_last || p.inner % whole == 0) ? whole : 1;
}

inline Matrix matrix_of(const BnProblem& p, int V, int max_threads_x) {
  Matrix m;
  m.size = p.outer * p.channels * p.inner;
  m.channels = static_cast<int>(p.channels);
  m.stacked = p.channels_last ? V / std::gcd(V, m.channels) : 1;
  m.width = static_cast<int>(p.channels_last ? m.stacked * p.channels : p.inner);
  m.rows = ceil_div(m.size, m.width);
  m.threads_x = 1;
  while (m.threads_x < max_threads_x && m.threads_x < m.packs(V)) m.threads_x *= 2;
  m.threads_y = kThreads / m.threads_x;
  return m;
}

// Scalars of the pack at `offset`; fewer than V at the end of the tensor alone.
template <int V>
__device__ __forceinline__ int pack_count(const Matrix& m, int64_t offset) {
  return m.size - offset < V ? static_cast<int>(m.size - offset) : V;
}

// (y − μ)·scale + bias with μ rounded to arithmetic precision; what the rounding left, μ_r − μ, goes into the bias.
// With mean ≫ std this keeps the digits of y − μ.
template <typename acc>
struct Affine {
  acc mean, scale, bias;

  Affine() = default;
  __device__ __forceinline__ Affine(const BnProblem& p, int c) {
    mean = static_cast<acc>(p.mean[c]);
    scale = static_cast<acc>(p.scale[c]);
    bias = static_cast<acc>(p.bias[c] + p.scale[c] * (mean - p.mean[c]));
  }
};

// f(scalar_t{}) for the scalar named at run time.
template <class F>
void with_scalar(Scalar scalar, F f) {
  switch (scalar) {
    case Scalar::f64:
      return f(double{});
    case Scalar::f32:
      return f(float{});
    case Scalar::f16:
      return f(__half{});
    case Scalar::bf16:
      return f(__nv_bfloat16{});
  }
}

}  // namespace convbn
