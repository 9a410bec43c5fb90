// Krylov verbs, one block of threads per system.
//
//   orthonormalize  h = Vᵀw, w ← w − V h, twice (CGS2), then w/‖w‖.  Vᵀw: a warp per basis vector, lanes along n;  V h:
//   a thread
//                   per entry, along the basis. The basis is read four times, w stays in the cache.
//   combine         out = V y, a thread per entry
//   norms           ‖x‖
// Products and sums are formed in float64, in an order fixed by n and k. Vectors whose squares would leave float64's
// range are scaled by a power of two (a float never needs it).
#pragma once
#include "device.cuh"
#include "krylov_kernels.h"

namespace convbn {

constexpr int kKrylovThreads = 256;
constexpr int kKrylovWarps = kKrylovThreads / kWarp;

template <typename scalar_t>
__device__ __forceinline__ scalar_t* basis_vector(const KrylovBasis& V, int64_t j, int64_t slot, int64_t n) {
  int b = 0;
  while (b + 1 < V.blocks && V.block[b + 1].first <= j) ++b;
  const auto& block = V.block[b];
  return static_cast<scalar_t*>(block.begin) + (j - block.first) * block.stride_vector + slot * n;
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

// Exponent e such that 2⁻ᵉx can be squared and summed in float64; 0 wherever that holds for x itself.
__device__ __forceinline__ int safe_exponent(double amax) {
  constexpr double kLow = 1e-120, kHigh = 1e120;
  if (amax == 0 || (amax >= kLow && amax <= kHigh) || !(amax <= 1.7976931348623157e308)) return 0;
  int e = 0;
  frexp(amax, &e);
  return e;
}

template <typename scalar_t>
__device__ __forceinline__ double block_norm(const scalar_t* x, int64_t n, int exponent, double* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
    const double v = exponent ? ldexp(static_cast<double>(x[i]), -exponent) : x[i];
    sum += v * v;
  }
  return sqrt(block_reduce<false>(sum, shared));
}

template <typename scalar_t>
__device__ __forceinline__ int block_exponent(const scalar_t* x, int64_t n, double* shared) {
  double amax = 0;
  for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
    const double v = fabs(static_cast<double>(x[i]));
    amax = v > amax || v != v ? v : amax;
  }
  return safe_exponent(block_reduce<true>(amax, shared));
}

// h[j] = v_jᵀv for j < k: warps take vectors in turn.
template <typename scalar_t>
__device__ __forceinline__ void project(const KrylovBasis& V, int64_t slot, int k, const scalar_t* v, int64_t n,
                                        double* h) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int j = warp; j < k; j += kKrylovWarps) {
    const scalar_t* basis = basis_vector<scalar_t>(V, j, slot, n);
    double sum = 0;
    for (int64_t i = lane; i < n; i += kWarp) sum += static_cast<double>(basis[i]) * v[i];
#pragma unroll
    for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(kFullMask, sum, half);
    if (lane == 0) h[j] = sum;
  }
}

// Σ_j h_j v_j[i]
template <typename scalar_t>
__device__ __forceinline__ double combination(const KrylovBasis& V, int64_t slot, int k, const double* h, int64_t n,
                                              int64_t i) {
  double sum = 0;
  for (int b = 0; b < V.blocks; ++b) {
    const auto& block = V.block[b];
    const int64_t last = b + 1 < V.blocks && V.block[b + 1].first < k ? V.block[b + 1].first : k;
    const scalar_t* entry = static_cast<const scalar_t*>(block.begin) + slot * n + i;
    for (int64_t j = block.first; j < last; ++j, entry += block.stride_vector) sum += h[j] * *entry;
  }
  return sum;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads, 1)
    krylov_orthonormalize_kernel(KrylovProblem p, KrylovBasis V, int k, const scalar_t* __restrict__ w,
                                 double* __restrict__ H) {
  CONVBN_DYNAMIC_SHARED(double, shared);  // [warps] for sums, [k] coefficients
  double* h = shared + kKrylovWarps;
  const int64_t n = p.n, slot = p.rows[blockIdx.x];
  const scalar_t* mine = w + blockIdx.x * n;
  scalar_t* v = basis_vector<scalar_t>(V, k, slot, n);
  double* column = H + blockIdx.x * int64_t{k + 2};

  const int exponent = block_exponent(mine, n, shared);
  for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
    v[i] = exponent ? static_cast<scalar_t>(ldexp(static_cast<double>(mine[i]), -exponent)) : mine[i];
  }
  __syncthreads();
  const double w_norm = block_norm(v, n, 0, shared);
  double norm = w_norm;
  if (k > 0) {
    for (int repeat = 0; repeat < 2; ++repeat) {
      project(V, slot, k, v, n, h);
      __syncthreads();
      for (int j = threadIdx.x; j < k; j += kKrylovThreads) {
        const double coefficient = ldexp(h[j], exponent);
        column[j] = repeat == 0 ? coefficient : column[j] + coefficient;
      }
      for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
        v[i] = static_cast<scalar_t>(v[i] - combination<scalar_t>(V, slot, k, h, n, i));
      }
      __syncthreads();
    }
    norm = block_norm(v, n, 0, shared);
  }
  for (int64_t i = threadIdx.x; i < n; i += kKrylovThreads) {
    v[i] = norm > 0 ? static_cast<scalar_t>(v[i] / norm) : scalar_t(0);
  }
  if (threadIdx.x == 0) {
    column[k] = ldexp(norm, exponent);
    column[k + 1] = ldexp(w_norm, exponent);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads, 1)
    krylov_combine_kernel(KrylovProblem p, KrylovBasis V, int K, const double* __restrict__ y,
                          scalar_t* __restrict__ out) {
  const int64_t i = int64_t{blockIdx.y} * kKrylovThreads + threadIdx.x;
  if (i >= p.n) return;
  const double sum = combination<scalar_t>(V, p.rows[blockIdx.x], K, y + blockIdx.x * int64_t{K}, p.n, i);
  out[blockIdx.x * p.n + i] = static_cast<scalar_t>(sum);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads, 1)
    krylov_norms_kernel(KrylovProblem p, const scalar_t* __restrict__ x, double* __restrict__ norms) {
  __shared__ double shared[kKrylovWarps];
  const scalar_t* mine = x + blockIdx.x * p.n;
  const int exponent = block_exponent(mine, p.n, shared);
  const double norm = block_norm(mine, p.n, exponent, shared);
  if (threadIdx.x == 0) norms[blockIdx.x] = ldexp(norm, exponent);
}

}  // namespace convbn
