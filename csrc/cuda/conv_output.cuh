// From the accumulators to memory: the tile is rounded into shared memory, its columns' statistics are taken there,
// of the values as they are stored, and whole rows of 16-byte packs are written.
#pragma once
#include "gemm.cuh"
#include "moments.cuh"

namespace convbn {

constexpr int kPitch = kTileN + 8;  // scalars per row: fragments of 4 and of 8 bytes find the banks free
constexpr int kParts = kThreads / kTileN, kPartRows = kTileM / kParts;  // of a column, for its statistics
constexpr int kTileBytes = kTileM * kPitch * sizeof(float);
constexpr int kMomentBytes = Moments::kFields * kParts * kTileN * sizeof(double);
constexpr int kGemmShared = std::max(kStages * kStageBytes, kTileBytes + kMomentBytes);
static_assert(kGemmShared <= 48 << 10, "more would need an attribute at every launch");

// The part of a tile that exists.
struct Extent {
  int rows, columns;
};

template <typename out_t>
struct OutputTile {
  out_t* values;  // (kTileM, kPitch)

  template <int n>
  __device__ __forceinline__ void put(int row, int column, const float (&x)[n]) const {
    Pack<out_t, n> pack;
#pragma unroll
    for (int l = 0; l < n; ++l) pack.value[l] = from_acc<out_t>(x[l]);
    typename Words<out_t, n>::type words;
    memcpy(&words, &pack, sizeof pack);
    *reinterpret_cast<typename Words<out_t, n>::type*>(values + row * kPitch + column) = words;
  }

  // out points to the tile's first element; the rows there are `stride` apart.
  template <int V>
  __device__ __forceinline__ void write(out_t* __restrict__ out, int64_t stride, Extent extent) const {
    constexpr int kAcross = kTileN / V, kDown = kThreads / kAcross;
    const int column = threadIdx.x % kAcross * V;
    if (column >= extent.columns) return;
    for (int row = threadIdx.x / kAcross; row < extent.rows; row += kDown) {
      const auto words = load_words<out_t, V>(values + row * kPitch + column);
      auto* to = out + row * stride + column;
      if constexpr (sizeof words == 16) {
        __stwb(reinterpret_cast<uint4*>(to), words);
      } else {
        *reinterpret_cast<typename Words<out_t, V>::type*>(to) = words;
      }
    }
  }

  // partial[field][channel] for the tile's columns: twice through each column, first for the mean. Ends behind a
  // barrier.
  __device__ __forceinline__ void statistics(double* shared, double* __restrict__ partial, int channels,
                                             Extent extent) const {
    const int column = threadIdx.x % kTileN, part = threadIdx.x / kTileN;
    const int first = part * kPartRows, last = extent.rows < first + kPartRows ? extent.rows : first + kPartRows,
              count = last - first;
    const out_t* v = values + column;
    Moments moments;
    if (count > 0 && column < extent.columns) {
      const float shift = to_acc(v[first * kPitch]);
      float sum = 0, rest = 0, squares = 0;
      for (int row = first; row < last; ++row) sum += to_acc(v[row * kPitch]) - shift;
      const float mean = sum / count;
      for (int row = first; row < last; ++row) {
        const float d = to_acc(v[row * kPitch]) - shift - mean;
        rest += d;  // what rounding left in the mean
        squares += d * d;
      }
      moments = {static_cast<double>(count), static_cast<double>(shift) + mean + rest / count,
                 static_cast<double>(squares - rest * (rest / count))};
    }
#pragma unroll
    for (int i = 0; i < Moments::kFields; ++i) shared[(i * kParts + part) * kTileN + column] = moments.field(i);
    __syncthreads();
    if (part == 0 && column < extent.columns) {
#pragma unroll
      for (int other = 1; other < kParts; ++other) {
        Moments next;
#pragma unroll
        for (int i = 0; i < Moments::kFields; ++i) next.field(i) = shared[(i * kParts + other) * kTileN + column];
        moments.merge(next);
      }
#pragma unroll
      for (int i = 0; i < Moments::kFields; ++i) partial[int64_t{i} * channels + column] = moments.field(i);
    }
  }
};

}  // namespace convbn
