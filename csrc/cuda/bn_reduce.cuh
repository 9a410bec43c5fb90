// Per-channel sums over one pass of the tensors, in an order fixed by the shape:
//   statistics       (count, mean, M₂ = Σ(y − mean)²)                          reads y
//   backward_reduce  Σg and Σg·(y − μ)                                         reads y, grad (residual or out)
// A thread walks down its column of packs (contiguous: along the rows of one channel) in arithmetic precision; the
// threads of a block are merged in a tree in float64, one partial result per block and column; a second kernel merges
// those, a warp per channel. No atomics. Means are merged by Chan's rule, so E[y²] − E[y]² never appears.
#pragma once
#include "bn_elementwise.cuh"
#include "moments.cuh"

namespace convbn {

struct Sums {
  static constexpr int kFields = 2;
  double g = 0, gd = 0;

  __device__ __forceinline__ void merge(const Sums& other) {
    g += other.g;
    gd += other.gd;
  }
  __device__ __forceinline__ double& field(int i) { return i == 0 ? g : gd; }
};

// Welford's running mean and M₂ of V columns, of values shifted by each column's first one: with |mean| ≫ std the
// differences are exact and keep all their digits.
template <typename scalar_t, int V>
struct StatisticsThread {
  using acc = acc_t<scalar_t>;
  using Result = Moments;
  const scalar_t* y;
  acc shift[V] = {}, mean[V] = {}, m2[V] = {};
  Moments tail[V];
  int count = 0;

  __device__ __forceinline__ void load_channel(int, int) {}
  __device__ __forceinline__ void add(int64_t offset, int valid) {
    acc x[V];
    load_pack<V>(y + offset, valid, x);
    if (valid < V) {  // once at most, at the end of the tensor
#pragma unroll
      for (int l = 0; l < V; ++l) {
        if (l < valid) tail[l] = {1, static_cast<double>(x[l]), 0};
      }
      return;
    }
    if (count == 0) {
#pragma unroll
      for (int l = 0; l < V; ++l) shift[l] = x[l];
    }
    const acc weight = acc(1) / ++count;
#pragma unroll
    for (int l = 0; l < V; ++l) {
      const acc d = x[l] - shift[l], delta = d - mean[l];
      mean[l] += delta * weight;
      m2[l] += delta * (d - mean[l]);
    }
  }
  __device__ __forceinline__ Moments result(int l) const {
    Moments moments{static_cast<double>(count), static_cast<double>(shift[l]) + mean[l], static_cast<double>(m2[l])};
    moments.merge(tail[l]);
    return moments;
  }
};

template <class Act, typename scalar_t, int V>
struct BackwardThread {
  using acc = acc_t<scalar_t>;
  using Result = Sums;
  const BnProblem& p;
  Affine<acc> bn[V];
  acc sum_g[V] = {}, sum_gd[V] = {};

  __device__ __forceinline__ void load_channel(int l, int channel) { bn[l] = Affine<acc>(p, channel); }
  __device__ __forceinline__ void add(int64_t offset, int valid) {
    acc d[V], g[V];
    masked_gradient<Act, scalar_t, V>(p, Lanes<true, Affine<acc>>{bn}, offset, valid, d, g);
#pragma unroll
    for (int l = 0; l < V; ++l) {  // behind the end of the tensor g is zero
      sum_g[l] += g[l];
      sum_gd[l] += g[l] * d[l];
    }
  }
  __device__ __forceinline__ Sums result(int l) const { return {sum_g[l], sum_gd[l]}; }
};

// partial[field][column][part], the result of a block over its share of a column; blockIdx.x numbers the columns,
// blockIdx.y the parts. Contiguous: a column is a channel, whose N·S/V packs are numbered through.
template <bool channels_last, int V, class Thread>
__device__ __forceinline__ void reduce_columns(const Matrix& m, Thread& thread, double* __restrict__ partial) {
  using Result = typename Thread::Result;
  constexpr int kColumns = channels_last ? V : 1;
  CONVBN_DYNAMIC_SHARED(double, shared);  // [field][column][thread]: neighbours in neighbouring banks
  const int threads_x = channels_last ? blockDim.x : 1, threads_y = channels_last ? blockDim.y : kThreads;
  const int tx = channels_last ? threadIdx.x : 0, ty = channels_last ? threadIdx.y : threadIdx.x;
  const int first = channels_last ? (blockIdx.x * blockDim.x + tx) * V : blockIdx.x;
  const int total = channels_last ? m.width : m.channels;

  if (first < total) {
#pragma unroll
    for (int l = 0; l < V; ++l) thread.load_channel(l, (first + (channels_last ? l : 0)) % m.channels);
    if constexpr (channels_last) {
      for (int64_t row = int64_t{blockIdx.y} * threads_y + ty; row < m.rows; row += int64_t{gridDim.y} * threads_y) {
        const int64_t offset = row * m.width + first;
        if (offset < m.size) thread.add(offset, pack_count<V>(m, offset));
      }
    } else {
      // Pack i of the channel is pack `column` of its plane `sample`; both advance without a division.
      const int packs = m.width / V, samples = static_cast<int>(m.rows) / m.channels, step = gridDim.y * threads_y;
      const int start = blockIdx.y * threads_y + ty, step_samples = step / packs, step_columns = step % packs;
      int sample = start / packs, column = start % packs;
      while (sample < samples) {
        thread.add((int64_t{sample} * m.channels + first) * m.width + column * V, V);
        sample += step_samples;
        column += step_columns;
        if (column >= packs) {
          column -= packs;
          ++sample;
        }
      }
    }
  }

  Result result[kColumns];
#pragma unroll
  for (int l = 0; l < V; ++l) {
    if constexpr (channels_last) {
      result[l] = thread.result(l);
    } else {
      result[0].merge(thread.result(l));
    }
  }
  const auto slot = [&](int field, int l, int thread) -> double& {
    return shared[(field * kColumns + l) * kThreads + thread];
  };
  const int me = ty * threads_x + tx;
  for (int half = threads_y / 2; half > 0; half /= 2) {  // the upper half gives, the lower half takes
    if (ty >= half && ty < 2 * half) {
#pragma unroll
      for (int l = 0; l < kColumns; ++l) {
#pragma unroll
        for (int i = 0; i < Result::kFields; ++i) slot(i, l, me) = result[l].field(i);
      }
    }
    __syncthreads();
    if (ty < half) {
#pragma unroll
      for (int l = 0; l < kColumns; ++l) {
        Result next;
#pragma unroll
        for (int i = 0; i < Result::kFields; ++i) next.field(i) = slot(i, l, me + half * threads_x);
        result[l].merge(next);
      }
    }
  }
  if (ty == 0 && first < total) {
#pragma unroll
    for (int l = 0; l < kColumns; ++l) {
#pragma unroll
      for (int i = 0; i < Result::kFields; ++i) {
        partial[int64_t{i * total + first + l} * gridDim.y + blockIdx.y] = result[l].field(i);
      }
    }
  }
}

template <bool channels_last, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>)
    bn_statistics_kernel(BnProblem p, Matrix m, double* partial) {
  StatisticsThread<scalar_t, V> thread{static_cast<const scalar_t*>(p.y)};
  reduce_columns<channels_last, V>(m, thread, partial);
}

template <bool channels_last, class Act, typename scalar_t, int V>
__global__ void __launch_bounds__(kThreads, kResident<scalar_t>)
    bn_backward_reduce_kernel(BnProblem p, Matrix m, double* partial) {
  BackwardThread<Act, scalar_t, V> thread{p};
  reduce_columns<channels_last, V>(m, thread, partial);
}

// Merge a channel's partial results: columns channel, channel + C, … of `stacked`, each with `parts`. One warp per
// channel.
template <class Result>
__device__ __forceinline__ Result merge_partials(const double* __restrict__ partial, int channel, int channels,
                                                 int stacked, int parts) {
  Result result;
  for (int i = threadIdx.x; i < stacked * parts; i += kWarp) {
    const int column = i / parts * channels + channel;
    Result next;
#pragma unroll
    for (int field = 0; field < Result::kFields; ++field) {
      next.field(field) = partial[int64_t{field * stacked * channels + column} * parts + i % parts];
    }
    result.merge(next);
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    Result next;
#pragma unroll
    for (int field = 0; field < Result::kFields; ++field) {
      next.field(field) = __shfl_down_sync(kFullMask, result.field(field), half);
    }
    result.merge(next);
  }
  return result;  // whole in lane 0
}

// The threads summed g·(y − μ_r) with the rounded mean: Σg·(y − μ) = that + (μ_r − μ)·Σg.
template <typename acc>
__global__ void bn_finish_backward_kernel(const double* __restrict__ partial, const double* __restrict__ mean,
                                          int channels, int stacked, int parts, double* __restrict__ sum_g,
                                          double* __restrict__ sum_gd) {
  const int channel = blockIdx.x * blockDim.y + threadIdx.y;
  if (channel >= channels) return;
  const auto sums = merge_partials<Sums>(partial, channel, channels, stacked, parts);
  if (threadIdx.x) return;
  sum_g[channel] = sums.g;
  sum_gd[channel] = sums.gd + (static_cast<acc>(mean[channel]) - mean[channel]) * sums.g;
}

}  // namespace convbn
