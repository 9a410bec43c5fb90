// Krylov verbs on vectors cut into chunks of kKrylovChunk scalars, a block of threads per chunk and system.
//
//   orthonormalize  CGS2 in three passes over the basis, chunk by chunk, each merged over the chunks by a second
//   kernel:
//                     1. v ← w,      h = Vᵀv     2. v ← v − V h,  h' = Vᵀv     3. v ← v − V h',  ‖v‖;     v ← v/‖v‖
//                   V h: a thread per entry, along the basis; Vᵀv: a warp per basis vector, lanes along the chunk.
//   combine         out = V y, a thread per entry
//   norms           ‖x‖
//   rotate, solve   the small problems of arnoldi.h, a block of threads per system
// A chunk's products are summed in the working precision for at most kRun terms of a lane, everything beyond in
// float64, in an order fixed by n and k alone. Vectors whose squares would leave the range are scaled by a power of
// two.
#pragma once
#include "krylov_block.cuh"

namespace convbn {

constexpr int kEntries = kKrylovChunk / kKrylovThreads;  // of a chunk per thread

// Where a block of threads works.
struct KrylovChunk {
  int64_t system, slot;
  int chunk, size;  // size: scalars in it
  int64_t begin;    // its first scalar
  __device__ __forceinline__ explicit KrylovChunk(const KrylovProblem& p) {
    system = blockIdx.x / p.chunks();
    chunk = static_cast<int>(blockIdx.x % p.chunks());
    slot = p.rows ? p.rows[system] : system;
    begin = int64_t{chunk} * kKrylovChunk;
    size = static_cast<int>(p.n - begin < kKrylovChunk ? p.n - begin : kKrylovChunk);
  }
};

template <typename scalar_t>
__device__ __forceinline__ scalar_t* basis_vector(const KrylovBasis& V, int64_t j, int64_t offset) {
  int b = 0;
  while (b + 1 < V.blocks && V.block[b + 1].first <= j) ++b;
  const auto& block = V.block[b];
  return static_cast<scalar_t*>(block.begin) + (j - block.first) * block.stride_vector + offset;
}

// sum += Σ_{j<k} c(j) v_j at a thread's entries of a chunk of `size`. Where c(j) = 0 the basis may hold anything.
template <typename scalar_t, typename acc_t, class Coefficient>
__device__ __forceinline__ void add_combination(const KrylovBasis& V, int64_t offset, int k, Coefficient c, int size,
                                                acc_t (&sum)[kEntries]) {
  for (int b = 0; b < V.blocks && V.block[b].first < k; ++b) {
    const auto& block = V.block[b];
    const int last = b + 1 < V.blocks && V.block[b + 1].first < k ? static_cast<int>(V.block[b + 1].first) : k;
    const scalar_t* v = static_cast<const scalar_t*>(block.begin) + offset;
    for (int j = static_cast<int>(block.first); j < last; ++j, v += block.stride_vector) {
      const acc_t factor = c(j);
      if (factor == 0) continue;
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        const int i = threadIdx.x + e * kKrylovThreads;
        if (i < size) sum[e] += factor * v[i];
      }
    }
  }
}

// Scratch: amax (A, chunks), exponent (A,), h (A, k + 1) with ‖v‖ last, partial (A, k + 1, chunks).
struct KrylovScratch {
  double *amax, *exponent, *h, *partial;
  KrylovScratch(double* memory, const KrylovProblem& p, int k)
      : amax(memory),
        exponent(amax + p.systems * p.chunks()),
        h(exponent + p.systems),
        partial(h + p.systems * (k + 1)) {}
};

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads)
    krylov_amax_kernel(KrylovProblem p, const scalar_t* __restrict__ x, double* __restrict__ amax) {
  __shared__ double shared[kKrylovWarps];
  const KrylovChunk c(p);
  const double most = block_reduce<true>(lane_amax(x + c.system * p.n + c.begin, c.size), shared);
  if (threadIdx.x == 0) amax[blockIdx.x] = most;
}

struct FirstPass {};
struct SecondPass {};
struct ThirdPass {};

// One of the three passes. V may be empty (norms): then v is not stored.
template <class Pass, typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads)
    krylov_project_kernel(KrylovProblem p, KrylovBasis V, int k, const scalar_t* __restrict__ w,
                          KrylovScratch scratch) {
  CONVBN_DYNAMIC_SHARED(double, shared);  // [warps] for the maximum, [k] coefficients
  __shared__ scalar_t tile[kKrylovChunk];
  const KrylovChunk c(p);
  const int64_t offset = c.slot * p.n + c.begin;
  scalar_t* v = V.blocks ? basis_vector<scalar_t>(V, k, offset) : nullptr;

  scalar_t value[kEntries] = {};
  if constexpr (std::is_same_v<Pass, FirstPass>) {
    const double amax = block_reduce<true>(lane_amax(scratch.amax + c.system * p.chunks(), p.chunks()), shared);
    const int exponent = safe_exponent<scalar_t>(amax);
    if (threadIdx.x == 0 && c.chunk == 0) scratch.exponent[c.system] = exponent;
    const scalar_t* from = w + c.system * p.n + c.begin;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int i = threadIdx.x + e * kKrylovThreads;
      if (i >= c.size) break;
      value[e] = exponent ? static_cast<scalar_t>(ldexp(static_cast<double>(from[i]), -exponent)) : from[i];
    }
  } else {
    double* h = shared + kKrylovWarps;
    for (int j = threadIdx.x; j < k; j += kKrylovThreads) h[j] = scratch.h[c.system * (k + 1) + j];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const int i = threadIdx.x + e * kKrylovThreads;
      if (i < c.size) value[e] = v[i];
    }
    __syncthreads();
    add_combination<scalar_t>(V, offset, k, [h](int j) { return static_cast<scalar_t>(-h[j]); }, c.size, value);
  }
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int i = threadIdx.x + e * kKrylovThreads;
    if (i >= c.size) break;
    tile[i] = value[e];
    if (v) v[i] = value[e];
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int j = (std::is_same_v<Pass, ThirdPass> ? k : 0) + warp; j <= k; j += kKrylovWarps) {
    const double sum =
        warp_sum(lane_dot<scalar_t>(j < k ? basis_vector<scalar_t>(V, j, offset) : tile, tile, c.size, lane));
    if (lane == 0) scratch.partial[(c.system * (k + 1) + j) * p.chunks() + c.chunk] = sum;
  }
}

// Adds the chunks up, a warp per coefficient: h for the next pass, and H (A, k + 2) complex, or norms (A,), for the
// caller. After the third pass only the norm (first = k).
__global__ void __launch_bounds__(kKrylovThreads)
    krylov_merge_kernel(KrylovProblem p, int pass, int k, int first, KrylovScratch scratch, double* __restrict__ H,
                        double* __restrict__ norms) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int groups = (k - first) / kKrylovWarps + 1;
  const int64_t system = blockIdx.x / groups;
  const int j = first + static_cast<int>(blockIdx.x % groups) * kKrylovWarps + warp;
  if (j > k) return;
  const double* parts = scratch.partial + (system * (k + 1) + j) * p.chunks();
  double sum = 0;
  for (int c = lane; c < p.chunks(); c += kWarp) sum += parts[c];
  sum = warp_sum(sum);
  if (lane > 0) return;
  const double value = j < k ? sum : sqrt(sum);
  const double true_value = ldexp(value, static_cast<int>(scratch.exponent[system]));
  scratch.h[system * (k + 1) + j] = value;
  if (norms) norms[system] = true_value;
  if (!H) return;
  double* column = H + 2 * system * (k + 2);
  column[2 * j] = pass == 2 && j < k ? column[2 * j] + true_value : true_value;
  if (pass == 1) {
    column[2 * j + 1] = 0;
    if (j == k) {
      column[2 * k + 2] = true_value;  // ‖w‖
      column[2 * k + 3] = 0;
    }
  }
}

// v_k ← v_k / ‖v_k‖; a zero stays zero.
template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads)
    krylov_normalize_kernel(KrylovProblem p, KrylovBasis V, int k, KrylovScratch scratch) {
  const KrylovChunk c(p);
  scalar_t* v = basis_vector<scalar_t>(V, k, c.slot * p.n + c.begin);
  const double norm = scratch.h[c.system * (k + 1) + k];
  for (int i = threadIdx.x; i < c.size; i += kKrylovThreads)
    v[i] = norm > 0 ? static_cast<scalar_t>(v[i] / norm) : scalar_t(0);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads)
    krylov_combine_kernel(KrylovProblem p, KrylovBasis V, int K, const double* __restrict__ y,
                          scalar_t* __restrict__ out) {
  const KrylovChunk c(p);
  const double* mine = y + 2 * c.system * K;
  double sum[kEntries] = {};
  add_combination<scalar_t>(V, c.slot * p.n + c.begin, K, [mine](int j) { return mine[2 * j]; }, c.size, sum);
#pragma unroll
  for (int e = 0; e < kEntries; ++e) {
    const int i = threadIdx.x + e * kKrylovThreads;
    if (i < c.size) out[c.system * p.n + c.begin + i] = static_cast<scalar_t>(sum[e]);
  }
}

__global__ void __launch_bounds__(kKrylovThreads)
    krylov_rotate_kernel(int k, double eps, const double* __restrict__ H, const double* __restrict__ limits,
                         int restart, double* __restrict__ small_problems) {
  CONVBN_DYNAMIC_SHARED(double, shared);  // h, cs, sn: [k] each, h one more
  const int j = k - 1;
  const SmallProblem small = SmallProblem::in(small_problems + blockIdx.x * SmallProblem::size(restart), restart);
  if (j == 0 && threadIdx.x == 0) small.begin();
  __syncthreads();
  if (!small.open()) return;
  const double* column = H + 2 * blockIdx.x * int64_t{k + 2};
  double *h = shared, *cs = h + k, *sn = cs + k;
  for (int i = threadIdx.x; i < k; i += kKrylovThreads) {
    h[i] = column[2 * i];
    if (i < j) {
      cs[i] = small.cs[i];
      sn[i] = small.sn[i];
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  SmallProblem near = small;
  near.cs = cs;
  near.sn = sn;
  near.append(h, column[2 * k], column[2 * k + 2], eps, limits[2 * blockIdx.x], limits[2 * blockIdx.x + 1]);
  if (near.steps() > j) {
    small.cs[j] = cs[j];
    small.sn[j] = sn[j];
  }
}

__global__ void __launch_bounds__(kKrylovThreads)
    krylov_solve_kernel(const double* __restrict__ small_problems, int restart, int K, double* __restrict__ out) {
  CONVBN_DYNAMIC_SHARED(double, y);  // [K]
  double* memory = const_cast<double*>(small_problems) + blockIdx.x * SmallProblem::size(restart);
  const SmallProblem small = SmallProblem::in(memory, restart);
  solve_small(small, small.steps(), K, y);
  for (int i = threadIdx.x; i < K; i += kKrylovThreads) {
    out[2 * (blockIdx.x * int64_t{K} + i)] = y[i];
    out[2 * (blockIdx.x * int64_t{K} + i) + 1] = 0;
  }
}

}  // namespace convbn
