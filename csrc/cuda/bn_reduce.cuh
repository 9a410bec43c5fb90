// Per-channel sums over one pass of the tensors, in an order fixed by the shape:
//   statistics       (count, mean, M₂ = Σ(y − mean)²)                          reads y
//   backward_reduce  Σg and Σg·(y − μ)                                         reads y, grad (residual or out)
// A thread walks down its column of packs (contiguous: along the rows of one channel) in arithmetic precision; the
// threads of a block are added up in a tree in float64, one partial result per block and column; a second kernel adds
// those, a block per channel. No atomics. Threads take means by Welford's rule, and sets are united as sums about a
// common pivot, one of the values' means: E[y²] − E[y]² never appears, and nothing is divided on the way.
#pragma once
#include "bn_elementwise.cuh"
#include "moments.cuh"

namespace convbn {

struct Sums {
  static constexpr int kFields = 2;
  double g = 0, gd = 0;

  __device__ __forceinline__ double& field(int i) { return i == 0 ? g : gd; }
};

// What trees add up: the fields as they are, and for moments sums about a pivot.
template <class Result>
struct Added : Result {
  static __device__ __forceinline__ double pivot(const Result&, int = kWarp) { return 0; }

  Added() = default;
  __device__ __forceinline__ Added(const Result& result, double) : Result(result) {}
  __device__ __forceinline__ Result about(double) const { return *this; }
  __device__ __forceinline__ void add(Added other) {
#pragma unroll
    for (int i = 0; i < Result::kFields; ++i) this->field(i) += other.field(i);
  }
};
template <>
struct Added<Moments> : MomentSums {
  using MomentSums::MomentSums;
  // About the mean of the lanes `across` apart: the nearer the pivot, the fewer digits of M₂ cancel. For whole warps,
  // valid in the first `across` lanes.
  static __device__ __forceinline__ double pivot(const Moments& m, int across = kWarp) {
    double sum = m.count > 0 ? m.mean : 0, sets = m.count > 0;
    for (int half = kWarp / 2; half >= across; half /= 2) {
      sum += __shfl_down_sync(kFullMask, sum, half);
      sets += __shfl_down_sync(kFullMask, sets, half);
    }
    return sets > 0 ? sum / sets : 0;
  }
};

// The sum over a block of `threads`, whole in thread 0: lanes by shuffles, then warps.
template <int threads, class Sum>
__device__ __forceinline__ Sum block_sum(Sum sum, int thread) {
  __shared__ double shared[Sum::kFields][threads / kWarp];
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    Sum next;
#pragma unroll
    for (int i = 0; i < Sum::kFields; ++i) next.field(i) = __shfl_down_sync(kFullMask, sum.field(i), half);
    sum.add(next);
  }
  if (thread % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < Sum::kFields; ++i) shared[i][thread / kWarp] = sum.field(i);
  }
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < threads / kWarp; ++warp) {
      Sum next;
#pragma unroll
      for (int i = 0; i < Sum::kFields; ++i) next.field(i) = shared[i][warp];
      sum.add(next);
    }
  }
  return sum;
}

// Welford's running mean and M₂ of V columns, of values shifted by each column's first one: with |mean| ≫ std the
// differences are exact and keep all their digits.
template <typename scalar_t, int V>
struct StatisticsThread {
  using acc = acc_t<scalar_t>;
  using Result = Moments;
  using Loaded = Pack<scalar_t, V>;
  static constexpr int kTogether = 4;
  const scalar_t* y;
  acc shift[V] = {}, mean[V] = {}, m2[V] = {};
  int count = 0, cut = 0;  // whole packs; scalars of the last row's, read again in the end
  int64_t cut_offset = 0;

  __device__ __forceinline__ void start(const Matrix&, int) {}
  __device__ __forceinline__ Loaded load(int64_t offset) const { return read_pack<V>(y + offset, V); }
  __device__ __forceinline__ void add_cut(int64_t offset, int valid) { cut_offset = offset, cut = valid; }
  __device__ __forceinline__ void add(const Loaded& loaded) {
    acc x[V];
    unpack<V>(loaded, x);
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
    if (l < cut) moments.merge({1, static_cast<double>(to_acc(y[cut_offset + l])), 0});
    return moments;
  }
};

template <class Act, typename scalar_t, int V, bool channels_last>
struct BackwardThread {
  using acc = acc_t<scalar_t>;
  using Result = Sums;
  using Loaded = Gradient<Act, scalar_t, V>;
  static constexpr int kTogether = 1;
  const BnProblem& p;
  Lanes<channels_last ? V : 1, Affine<acc>> bn;
  acc sum_g[V] = {}, sum_gd[V] = {};

  __device__ __forceinline__ void start(const Matrix& m, int first) {
    const auto make = [&](int channel) { return Affine<acc>(p, channel); };
    if constexpr (channels_last) {
      bn = lanes_of_columns<V, Affine<acc>>(m, first, make);
    } else {
      bn.parameters[0] = make(first);
    }
  }
  __device__ __forceinline__ Loaded load(int64_t offset) const { return Loaded::load(p, offset, V); }
  __device__ __forceinline__ void add_cut(int64_t offset, int valid) { add(Loaded::load(p, offset, valid)); }
  __device__ __forceinline__ void add(const Loaded& loaded) {
    acc d[V], g[V];
    loaded.masked(p, bn, d, g);
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
  using Sum = Added<Result>;
  const auto write = [&](Result result, int column, int columns) {
#pragma unroll
    for (int i = 0; i < Result::kFields; ++i) {
      partial[int64_t{i * columns + column} * gridDim.y + blockIdx.y] = result.field(i);
    }
  };
  const auto load = [&](int64_t offset) { return thread.load(offset); };
  const auto add = [&](int64_t, const auto& loaded) { thread.add(loaded); };

  if constexpr (channels_last) {
    CONVBN_DYNAMIC_SHARED(double, shared);  // [field][lane][thread of the lower half]: neighbours in neighbouring banks
    const auto slot = [&](int field, int l, int row) -> double& {
      return shared[(field * V + l) * (kThreads / 2) + row * blockDim.x + threadIdx.x];
    };
    const int block = blockIdx.x * blockDim.x * V, first = block + threadIdx.x * V, ty = threadIdx.y;
    thread.start(m, block);
    if (first < m.width) {
      walk_rows(
          m, first, int64_t{blockIdx.y} * blockDim.y + ty, int64_t{gridDim.y} * blockDim.y,
          [&](int64_t packs, auto next) { walk<Thread::kTogether>(packs, next, load, add); },
          [&](int64_t offset) { thread.add_cut(offset, pack_count<V>(m, offset)); });
    }
    __shared__ double pivot[V][kWarp];
    if (ty * static_cast<int>(blockDim.x) < kWarp) {
#pragma unroll
      for (int l = 0; l < V; ++l) {
        const double p = Sum::pivot(thread.result(l), blockDim.x);
        if (ty == 0) pivot[l][threadIdx.x] = p;
      }
    }
    __syncthreads();
    const auto mine = [&](int l) { return Sum(thread.result(l), pivot[l][threadIdx.x]); };
    int half = blockDim.y / 2;
    if (ty >= half) {
#pragma unroll
      for (int l = 0; l < V; ++l) {
        Sum sum = mine(l);
#pragma unroll
        for (int i = 0; i < Sum::kFields; ++i) slot(i, l, ty - half) = sum.field(i);
      }
    }
    __syncthreads();
    if (ty < half) {
#pragma unroll
      for (int l = 0; l < V; ++l) {
        Sum sum = mine(l);
#pragma unroll
        for (int i = 0; i < Sum::kFields; ++i) slot(i, l, ty) += sum.field(i);
      }
    }
    while (half /= 2) {
      __syncthreads();
      if (ty < half) {
#pragma unroll
        for (int l = 0; l < V; ++l) {
#pragma unroll
          for (int i = 0; i < Sum::kFields; ++i) slot(i, l, ty) += slot(i, l, ty + half);
        }
      }
    }
    if (ty == 0 && first < m.width) {
#pragma unroll
      for (int l = 0; l < V; ++l) {
        Sum sum;
#pragma unroll
        for (int i = 0; i < Sum::kFields; ++i) sum.field(i) = slot(i, l, 0);
        write(sum.about(pivot[l][threadIdx.x]), first + l, m.width);
      }
    }
  } else {
    // Pack i of the channel is pack `column` of its plane `sample`; both advance without a division.
    const int channel = blockIdx.x, packs = m.width / V, samples = static_cast<int>(m.rows) / m.channels;
    const int step = gridDim.y * kThreads, start = blockIdx.y * kThreads + threadIdx.x;
    const int step_samples = step / packs, step_columns = step % packs;
    int sample = start / packs - step_samples, column = start % packs - step_columns;
    thread.start(m, channel);
    const int64_t all = int64_t{samples} * packs;
    walk<Thread::kTogether>(
        start < all ? (all - start + step - 1) / step : 0,
        [&] {
          sample += step_samples;
          column += step_columns;
          if (column >= packs) {
            column -= packs;
            ++sample;
          }
          return (int64_t{sample} * m.channels + channel) * m.width + int64_t{column} * V;
        },
        load, add);
    __shared__ double shared;
    if (threadIdx.x < kWarp) {
      const double p = Sum::pivot(thread.result(0), 1);
      if (threadIdx.x == 0) shared = p;
    }
    __syncthreads();
    const double pivot = shared;
    Sum sum;
#pragma unroll
    for (int l = 0; l < V; ++l) sum.add(Sum(thread.result(l), pivot));
    sum = block_sum<kThreads>(sum, threadIdx.x);
    if (threadIdx.x == 0) write(sum.about(pivot), channel, m.channels);
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
  BackwardThread<Act, scalar_t, V, channels_last> thread{p};
  reduce_columns<channels_last, V>(m, thread, partial);
}

constexpr int kFinishThreads = 128;

// A channel's partial results united, whole in thread 0: columns channel, channel + C, … of `stacked`, each with
// `parts`. A block of kFinishThreads per channel.
template <class Result>
__device__ __forceinline__ Result unite_partials(const double* __restrict__ partial, int channels, int stacked,
                                                 int parts) {
  using Sum = Added<Result>;
  const auto result_at = [&](int i) {
    const int column = i / parts * channels + blockIdx.x;
    Result result;
#pragma unroll
    for (int field = 0; field < Result::kFields; ++field) {
      result.field(field) = partial[int64_t{field * stacked * channels + column} * parts + i % parts];
    }
    return result;
  };
  const double pivot = Sum::pivot(result_at(0));
  Sum sum;
#pragma unroll 4
  for (int i = threadIdx.x; i < stacked * parts; i += kFinishThreads) sum.add(Sum(result_at(i), pivot));
  return block_sum<kFinishThreads>(sum, threadIdx.x).about(pivot);
}

// The threads summed g·(y − μ_r) with the rounded mean: Σg·(y − μ) = that + (μ_r − μ)·Σg.
template <typename acc>
__global__ void bn_finish_backward_kernel(const double* __restrict__ partial, const double* __restrict__ mean,
                                          int channels, int stacked, int parts, double* __restrict__ sum_g,
                                          double* __restrict__ sum_gd) {
  const int channel = blockIdx.x;
  const auto sums = unite_partials<Sums>(partial, channels, stacked, parts);
  if (threadIdx.x) return;
  sum_g[channel] = sums.g;
  sum_gd[channel] = sums.gd + (static_cast<acc>(mean[channel]) - mean[channel]) * sums.g;
}

}  // namespace convbn
