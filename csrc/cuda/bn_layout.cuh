// How both memory layouts become one matrix of packs, and how blocks of threads cover it.
//
//   channels_last (M, C):   f = V/gcd(V, C) rows side by side make rows of f·C scalars,
//                           a whole number of packs for every C;
//                           column j belongs to channel j mod C. The last row may be cut short.
//   contiguous (N, C, S):   N·C rows of S scalars; row r belongs to channel r mod C.
//                           Packs where V divides S, else V = 1.
// A block is threads_x packs wide and threads_y rows high.
#pragma once
#include <algorithm>
#include <numeric>

#include "bn.h"
#include "pack.cuh"

namespace convbn {

constexpr int kThreads = 256;
// Blocks that must fit on a multiprocessor: two keep enough loads in flight. float64 needs the registers more.
template <typename scalar_t>
constexpr int kResident = sizeof(scalar_t) == 8 ? 1 : 2;
// Blocks that reduce: two for each of an H100's multiprocessors, which are enough to keep its memory busy, and fixed,
// so that sums do not depend on the card. Of elementwise kernels more, so that the last ones end together.
constexpr int64_t kBlocks = 264, kElementwiseBlocks = 1056;
constexpr int64_t kPacksPerThread = 4;  // at least, before another block is worth its start and its partial result

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

inline Matrix matrix_of(const BnProblem& p, int V) {
  Matrix m;
  m.size = p.outer * p.channels * p.inner;
  m.channels = static_cast<int>(p.channels);
  m.stacked = p.channels_last ? V / std::gcd(V, m.channels) : 1;
  m.width = static_cast<int>(p.channels_last ? m.stacked * p.channels : p.inner);
  m.rows = ceil_div(m.size, m.width);
  m.threads_x = 1;
  while (m.threads_x < kWarp && m.threads_x < m.packs(V)) m.threads_x *= 2;
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
  static constexpr int kFields = 3;
  acc mean, scale, bias;

  Affine() = default;
  __device__ __forceinline__ Affine(const BnProblem& p, int c) {
    mean = static_cast<acc>(p.mean[c]);
    scale = static_cast<acc>(p.scale[c]);
    bias = static_cast<acc>(p.bias[c] + p.scale[c] * (mean - p.mean[c]));
  }
  __device__ __forceinline__ acc& field(int i) { return i == 0 ? mean : i == 1 ? scale : bias; }
};

// The parameters of a pack's scalars: one channel each (n = V), or one for all (n = 1).
template <int n, class Parameters>
struct Lanes {
  Parameters parameters[n];
  __device__ __forceinline__ const Parameters& operator()(int lane) const { return parameters[n == 1 ? 0 : lane]; }
};

// channels_last: those of the thread's pack of columns. The block, whose columns begin at `first`, makes each column's
// once, in float64, and hands them over through shared memory. Every thread of the block must come here.
template <int V, class Parameters, class Make>
__device__ __forceinline__ Lanes<V, Parameters> lanes_of_columns(const Matrix& m, int first, Make make) {
  using acc = std::remove_reference_t<decltype(Parameters().field(0))>;
  using Piece = Pack<acc, std::min<int>(V, 16 / sizeof(acc))>;  // 16 bytes, neighbours' side by side: banks are free
  constexpr int kFields = Parameters::kFields, kWide = sizeof(Piece) / sizeof(acc), kPieces = V / kWide;
  __shared__ Piece shared[kFields][kPieces][kWarp + 4];  // and pieces half of the banks apart
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < static_cast<int>(blockDim.x) * V; i += kThreads) {
    Parameters parameters = make((first + i) % m.channels);
#pragma unroll
    for (int field = 0; field < kFields; ++field) {
      shared[field][i % V / kWide][i / V].value[i % kWide] = parameters.field(field);
    }
  }
  __syncthreads();
  Lanes<V, Parameters> lanes;
#pragma unroll
  for (int field = 0; field < kFields; ++field) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const Piece values = shared[field][piece][threadIdx.x];
#pragma unroll
      for (int l = 0; l < kWide; ++l) lanes.parameters[piece * kWide + l].field(field) = values.value[l];
    }
  }
  return lanes;
}

// f(scalar_t{}) for the scalar named at run time.
template <class F>
__host__ __device__ void with_scalar(Scalar scalar, F f) {
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
