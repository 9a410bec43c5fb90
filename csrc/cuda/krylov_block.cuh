// What a block of threads does to vectors: sums, norms, the small problem's triangle. Used by the verbs (krylov.cuh)
// and by the whole cycle (gmres_cycle.cuh).
//
// Products are summed in the working precision for at most kRun terms of a lane, everything beyond in float64, in an
// order fixed by the sizes alone. Vectors whose squares would leave the range are scaled by a power of two.
#pragma once
#include "device.cuh"
#include "krylov_kernels.h"

namespace convbn {

constexpr int kKrylovThreads = 256;
constexpr int kKrylovWarps = kKrylovThreads / kWarp;
constexpr int kRun = 16;

template <class F>
void with_real(bool is_double, F f) {
  is_double ? f(double{}) : f(float{});
}

// The block's sum (or maximum) of one value per thread, for every thread; `shared` holds kKrylovWarps values.
template <bool maximum>
__device__ __forceinline__ double block_reduce(double value, double* shared) {
  const auto join = [](double a, double b) { return maximum ? (a > b || a != a ? a : b) : a + b; };  // NaN wins
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) value = join(value, __shfl_xor_sync(kFullMask, value, half));
  __syncthreads();  // the last use of shared is over
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
  for (int warp = 1; warp < kKrylovWarps; ++warp) value = join(value, shared[warp]);
  return value;
}

__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_xor_sync(kFullMask, value, half);
  return value;
}

// Exponent e such that 2⁻ᵉx can be squared and summed; 0 wherever that holds for x itself.
template <typename scalar_t>
__device__ __forceinline__ int safe_exponent(double amax) {
  constexpr bool single = sizeof(scalar_t) == 4;
  constexpr double kLow = single ? 1e-9 : 1e-120, kHigh = single ? 1e12 : 1e120;
  if (amax == 0 || (amax >= kLow && amax <= kHigh) || !(amax <= 1.7976931348623157e308)) return 0;
  int e = 0;
  frexp(amax, &e);
  return e;
}

// Largest |x_i| of a thread's share.
template <typename scalar_t>
__device__ __forceinline__ double lane_amax(const scalar_t* x, int64_t n) {
  double amax = 0;
  for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
    const double v = fabs(static_cast<double>(x[i]));
    amax = v > amax || v != v ? v : amax;
  }
  return amax;
}

// A lane's share of aᵀb.
template <typename scalar_t>
__device__ __forceinline__ double lane_dot(const scalar_t* a, const scalar_t* b, int64_t n, int lane) {
  double sum = 0;
  for (int64_t first = lane; first < n; first += kRun * kWarp) {
    scalar_t part = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int64_t at = first + i * kWarp;
      if (at < n) part += a[at] * b[at];
    }
    sum += part;
  }
  return sum;
}

// v − Σ_{j<k} h_j v_j at one entry; vector(j) → v_j.
template <typename scalar_t, class Vector>
__device__ __forceinline__ scalar_t subtract_combination(scalar_t v, int k, const double* h, Vector vector, int64_t i) {
#pragma unroll 4
  for (int j = 0; j < k; ++j) v -= static_cast<scalar_t>(h[j]) * vector(j)[i];
  return v;
}

// y of R y = g for the first `steps` columns into shared memory (and zero up to K), by the whole block.
__device__ __forceinline__ void solve_small(const SmallProblem& small, int steps, int K, double* y) {
  for (int i = threadIdx.x; i < K; i += blockDim.x) y[i] = i < steps ? small.g[i] : 0;
  __syncthreads();
  for (int j = steps - 1; j >= 0; --j) {
    const double* column = small.R + int64_t{j} * (j + 1) / 2;
    const double yj = y[j] / column[j];
    __syncthreads();  // everybody has read y_j
    if (threadIdx.x == 0) y[j] = yj;
    for (int i = threadIdx.x; i < j; i += blockDim.x) y[i] -= column[i] * yj;
    __syncthreads();
  }
}

}  // namespace convbn
