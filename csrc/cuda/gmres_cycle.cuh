// A restart cycle of GMRES in one launch: a block of threads per system, from its residual to its correction.
//
//   v₀ = r/‖r‖;   w = A v_j,   h = Vᵀw,  w ← w − V h  (twice, CGS2),   v_{j+1} = w/‖w‖,   rotate;   u = V y
//
//   A v      a thread per output element, along taps and input channels; padding by index, nothing is written out
//   Vᵀw      a warp per basis vector, lanes along n;     V h, V y: a thread per entry, along the basis
//   rotate   thread 0, on coefficients in shared memory (arnoldi.h)
//
// The first `near` basis vectors live in shared memory, the others in global memory (L2 while they fit). A system that
// is done leaves the launch; what it has to tell is in its small problem. No block waits for another.
#pragma once
#include "krylov_block.cuh"

namespace convbn {

template <typename scalar_t>
__device__ __forceinline__ void apply_stencil(const ConvStencil& A, const scalar_t* v, scalar_t* w) {
  const auto* weights = static_cast<const scalar_t*>(A.weight);
  const auto* row_scale = static_cast<const scalar_t*>(A.row_scale);
  const int plane_in = A.in[0] * A.in[1] * A.in[2], plane_out = A.out[0] * A.out[1] * A.out[2];
  const int taps = A.kernel[0] * A.kernel[1] * A.kernel[2];
  const int group_in = A.channels_in / A.groups, group_out = A.channels_out / A.groups;
  for (int i = threadIdx.x; i < A.channels_out * plane_out; i += kKrylovThreads) {
    const int o = i / plane_out, position = i % plane_out;
    const int at[3] = {position / (A.out[1] * A.out[2]), position / A.out[2] % A.out[1], position % A.out[2]};
    const scalar_t* from = v + o / group_out * group_in * plane_in;
    const scalar_t* weight = weights + o * group_in * taps;
    const auto source = [&](int axis, int tap) {
      const int p = at[axis] * A.stride[axis] + tap * A.dilation[axis] - A.before[axis];
      return source_position(p, A.in[axis], A.mode);
    };
    scalar_t sum = 0;
    for (int a = 0, tap = 0; a < A.kernel[0]; ++a) {
      const int z = source(0, a);
      for (int b = 0; b < A.kernel[1]; ++b) {
        const int y = source(1, b);
        for (int c = 0; c < A.kernel[2]; ++c, ++tap) {
          const int x = source(2, c);
          if (z < 0 || y < 0 || x < 0) continue;  // zero padding
          const scalar_t* pixel = from + (z * A.in[1] + y) * A.in[2] + x;
          for (int channel = 0; channel < group_in; ++channel)
            sum += weight[channel * taps + tap] * pixel[channel * plane_in];
        }
      }
    }
    w[i] = row_scale ? row_scale[i] * sum : sum;
  }
}

// Doubles of shared memory in front of the basis: sums of the warps, h and column (and ‖w‖), cs, sn, g.
CONVBN_HOST_DEVICE constexpr int64_t cycle_doubles(int64_t restart) {
  return kKrylovWarps + 2 * (restart + 1) + 2 * restart + (restart + 1);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kKrylovThreads, 1) gmres_cycle_kernel(GmresCycle c, ConvStencil A) {
  CONVBN_DYNAMIC_SHARED(double, shared);
  const int n = c.n, restart = c.restart, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  double *sums = shared, *h = sums + kKrylovWarps, *column = h + restart + 1;
  SmallProblem small = SmallProblem::in(c.small + blockIdx.x * SmallProblem::size(restart), restart);
  small.cs = column + restart + 1;
  small.sn = small.cs + restart;
  small.g = small.sn + restart;
  auto* near = reinterpret_cast<scalar_t*>(shared + cycle_doubles(restart));
  auto* far = static_cast<scalar_t*>(c.far) + blockIdx.x * int64_t{restart + 1 - c.near} * n;
  const auto vector = [=](int j) { return j < c.near ? near + j * n : far + int64_t{j - c.near} * n; };
  const auto norm_of = [&](const scalar_t* x) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += kKrylovThreads) sum += static_cast<double>(x[i]) * x[i];
    return sqrt(block_reduce<false>(sum, sums));
  };
  const auto divide = [&](const scalar_t* x, double norm, scalar_t* v) {
    for (int i = threadIdx.x; i < n; i += kKrylovThreads)
      v[i] = norm > 0 ? static_cast<scalar_t>(x[i] / norm) : scalar_t(0);
  };

  if (threadIdx.x == 0) small.begin();
  const auto* r = static_cast<const scalar_t*>(c.r) + blockIdx.x * int64_t{n};
  divide(r, norm_of(r), vector(0));
  __syncthreads();

  for (int j = 0; j < restart && small.open(); ++j) {
    const int k = j + 1;
    scalar_t* w = vector(k);
    apply_stencil(A, vector(j), w);
    __syncthreads();
    const int exponent = safe_exponent<scalar_t>(block_reduce<true>(lane_amax(w, n), sums));
    if (exponent) {  // the scale of A must not matter
      for (int i = threadIdx.x; i < n; i += kKrylovThreads)
        w[i] = static_cast<scalar_t>(ldexp(static_cast<double>(w[i]), -exponent));
    }
    const double w_norm = norm_of(w);  // each thread reads what it wrote; its barriers publish w
    for (int repeat = 0; repeat < 2; ++repeat) {
      for (int i = warp; i < k; i += kKrylovWarps) {
        const double sum = warp_sum(lane_dot<scalar_t>(vector(i), w, n, lane));
        if (lane == 0) {
          h[i] = sum;
          column[i] = repeat == 0 ? sum : column[i] + sum;
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < n; i += kKrylovThreads) w[i] = subtract_combination(w[i], k, h, vector, i);
      __syncthreads();
    }
    const double norm = norm_of(w);
    if (threadIdx.x == 0) {
      for (int i = 0; i < k; ++i) column[i] = ldexp(column[i], exponent);
      small.append(column, ldexp(norm, exponent), ldexp(w_norm, exponent), c.eps, c.limits[2 * blockIdx.x],
                   c.limits[2 * blockIdx.x + 1]);
    }
    divide(w, norm, w);
    __syncthreads();
  }

  const int steps = small.steps();
  solve_small(small, steps, steps, h);
  auto* u = static_cast<scalar_t*>(c.u) + blockIdx.x * int64_t{n};
  for (int i = threadIdx.x; i < n; i += kKrylovThreads) {
    double sum = 0;
    for (int j = 0; j < steps; ++j) sum += h[j] * vector(j)[i];
    u[i] = static_cast<scalar_t>(sum);
  }
}

}  // namespace convbn
