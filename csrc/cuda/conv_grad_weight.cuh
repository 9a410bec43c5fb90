// The gradient of the weight and the sums of the normalisation's backward pass, in one pass over y, grad and x.
//
//   dy = a·g + b·d + c  with  g = grad·act′,  d = y − μ;  b and c depend on Σg and Σg·d, which are not known yet. So
//   dw (K, taps·C) = dyᵀ X = a·(gᵀX) + b·(dᵀX) + c·(1ᵀX),  X = im2col(x) (pixels, taps·C), per group of channels,
// is put together at the end. A block's tile holds g (rows 0 to 63) and d (64 to 127) of the same 64 channels, times 64
// columns of X, over a range (split) of pixels. Blocks of the first columns add up Σg and Σg·d while they make g and d,
// those of the first channels the columns of X.
// Floats: the product sees g' = g − s in its precision, s a guess of mean(g), and what that takes from the mean is
// given back: c + a·mean(g − g'). So means that cancel in dw cost no digits. Halves: g is rounded first, s = 0.
// depthwise: a block per 64 channels, tap and split, pixels over the rows of threads.
// All partial results are merged in the order of their splits, in float64.
#pragma once
#include "bn_reduce.cuh"
#include "conv_output.cuh"

namespace convbn {

struct GradientSums : Sums {
  static constexpr int kFields = 3;
  double lost = 0;  // Σ(g − s − g')

  __device__ __forceinline__ double& field(int i) { return i < Sums::kFields ? Sums::field(i) : lost; }
};

struct GradWeightPartial {
  float* products;  // [split][g, d][K][taps·C/G], depthwise [split][g, d][taps][K]
  float* columns;   // [split][G][taps·C/G], depthwise [split][taps][K]
  double* sums;     // [field][K][split]
  int channels = 0, splits = 0;

  __device__ __forceinline__ double& sum(int field, int channel, int split) const {
    return sums[(int64_t{field} * channels + channel) * splits + split];
  }
};

// Sums over the rows of threads, `across` wide; valid in the first row.
template <int V>
__device__ __forceinline__ void add_up(const float (&mine)[V], int across, double* shared, double (&total)[V]) {
  const int y = threadIdx.x / across;
#pragma unroll
  for (int l = 0; l < V; ++l) total[l] = mine[l];
  for (int half = kThreads / across / 2; half > 0; half /= 2) {  // the upper half gives, the lower half takes
    if (y >= half && y < 2 * half) {
#pragma unroll
      for (int l = 0; l < V; ++l) shared[l * kThreads + threadIdx.x] = total[l];
    }
    __syncthreads();
    if (y < half) {
#pragma unroll
      for (int l = 0; l < V; ++l) total[l] += shared[l * kThreads + threadIdx.x + half * across];
    }
  }
}

// g and d of kTileK channels as rows of one tile.
constexpr int kTileK = kTileM / 2;

template <class P, class Source, int V>
struct GradientParts {
  using scalar_t = typename Source::scalar_t;
  using Layout = typename P::template Layout<kTileM>;
  using Half = typename P::template Layout<kTileK>;
  static constexpr int kChunk = Layout::kChunk;
  static_assert(Half::kPerThread == 1);

  const Source source;
  char* const tiles;
  const int channel, columns;  // this thread's first one, and how many there are from it on
  const bool adding;
  int left;  // pixels
  int64_t offset;
  typename Source::template Raw<kChunk> raw;  // on the way, not yet in shared memory
  bool valid = false;
  // Halves: g is rounded to begin with, as torch rounds it between its operators, and nothing is lost.
  static constexpr bool kLoses = sizeof(scalar_t) == 4;
  float sum_g[kChunk] = {}, sum_gd[kChunk] = {}, lost[kLoses ? kChunk : 1] = {};

  __device__ __forceinline__ GradientParts(const Source& s, char* shared, int first_channel, int channels_left,
                                           int64_t begin, int64_t end, bool adding_up)
      : source(s),
        tiles(shared),
        channel(first_channel + Half::row(0)),
        columns(channels_left - Half::row(0)),
        adding(adding_up),
        left(static_cast<int>(end - begin) - Half::k(0)),
        offset((begin + Half::k(0)) * s.channels + channel) {}

  __device__ __forceinline__ char* tile(int stage) const { return tiles + stage * kStageBytes; }

  __device__ __forceinline__ void fetch(int stage) {
    valid = left > 0 && columns > 0;
    if constexpr (V == kChunk) {
      if (valid) raw = source.template load<V>(offset);
    } else {
      float g[kChunk] = {}, d[kChunk] = {};
#pragma unroll
      for (int l = 0; l < kChunk; ++l) {
        if (valid && l < columns) make<1>(source.template load<1>(offset + l), l, g, d);
      }
      put(stage, Half::row(0), g);
      put(stage, Half::row(0) + kTileK, d);
    }
    left -= kDepth<scalar_t>;
    offset += int64_t{kDepth<scalar_t>} * source.channels;
  }

  __device__ __forceinline__ void store(int stage) {
    if constexpr (V == kChunk) {
      float g[kChunk] = {}, d[kChunk] = {};
      if (valid) make<kChunk>(raw, 0, g, d);
      put(stage, Half::row(0), g);
      put(stage, Half::row(0) + kTileK, d);
    }
  }

  // n values of the chunk from its first one on.
  template <int n>
  __device__ __forceinline__ void make(const typename Source::template Raw<n>& from, int first, float (&g_out)[kChunk],
                                       float (&d_out)[kChunk]) {
    float g[n], d[n], s[n];
    source.template parts<n>(from, channel + first, g, d);
    source.template guess<n>(channel + first, s);
#pragma unroll
    for (int l = 0; l < n; ++l) {
      if constexpr (!kLoses) g[l] = to_acc(from_acc<scalar_t>(g[l]));
      g_out[first + l] = g[l] - s[l];
      d_out[first + l] = d[l];
    }
    if (!adding) return;
#pragma unroll
    for (int l = 0; l < n; ++l) {
      const float centred = g[l] - s[l];
      sum_g[first + l] += g[l];
      sum_gd[first + l] += g[l] * d[l];
      if constexpr (kLoses) lost[first + l] += centred - P::rounded(centred);
    }
  }

  __device__ __forceinline__ void put(int stage, int row, const float (&x)[kChunk]) {
    Pack<scalar_t, kChunk> pack;
#pragma unroll
    for (int l = 0; l < kChunk; ++l) pack.value[l] = from_acc<scalar_t>(x[l]);
    uint4 words;
    memcpy(&words, &pack, sizeof words);
    *reinterpret_cast<uint4*>(tile(stage) + Layout::chunk(row, Half::k(0))) = words;
  }

  __device__ __forceinline__ void write_sums(double* shared, const GradWeightPartial& partial, int split) {
    const auto write = [&](int field, const float (&mine)[kChunk]) {
      double total[kChunk];
      add_up(mine, Half::kLine, shared, total);
      if (threadIdx.x >= Half::kLine) return;
#pragma unroll
      for (int l = 0; l < kChunk; ++l) {
        if (l < columns) partial.sum(field, channel + l, split) = total[l];
      }
    };
    write(0, sum_g);
    write(1, sum_gd);
    if constexpr (kLoses) {
      write(2, lost);
    } else {
      write(2, {});
    }
    __syncthreads();
  }
};

// A product that also sums its second operand over k, a quarter of each step per thread of a column.
template <class P>
struct WithColumnSums : P {
  using Layout = typename P::template Layout<kTileN>;
  using scalar_t = typename Layout::scalar_t;
  static constexpr int kShare = kDepth<scalar_t> / kParts;
  bool adding = false;
  float sum = 0;

  __device__ __forceinline__ void multiply(const char* tile_a, const char* tile_b) {
    P::multiply(tile_a, tile_b);
    if (!adding) return;
    const int row = threadIdx.x % kTileN, first = threadIdx.x / kTileN * kShare;
#pragma unroll
    for (int k = first; k < first + kShare; ++k) {
      const char* chunk = tile_b + Layout::chunk(row / Layout::kChunk * Layout::kChunk, k);
      sum += P::rounded(reinterpret_cast<const scalar_t*>(chunk)[row % Layout::kChunk]);
    }
  }
  __device__ __forceinline__ void write_sums(float* shared, float* __restrict__ columns, int count) const {
    shared[threadIdx.x] = sum;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      float total = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part) total += shared[part * kTileN + threadIdx.x];
      columns[threadIdx.x] = total;
    }
    __syncthreads();
  }
};

struct GradWeightShape {
  Gather input;
  int tiles_m = 0, tiles_n = 0, groups = 1;
  int64_t split_pixels = 0;   // a multiple of every kDepth
  int rows = 0, columns = 0;  // of one group's result: K/G, taps·C/G
};

template <class P, class Source, int V>
__global__ void __launch_bounds__(kThreads, kGemmResident<P>)
    conv_grad_weight_kernel(GradWeightShape s, Source source, Values<typename Source::scalar_t> input,
                            GradWeightPartial partial) {
  using scalar_t = typename Source::scalar_t;
  CONVBN_DYNAMIC_SHARED(char, shared);
  const int tile_n = blockIdx.x % s.tiles_n, tile_m = blockIdx.x / s.tiles_n;
  const int group = blockIdx.y % s.groups, split = blockIdx.y / s.groups;
  const int first_row = tile_m * kTileK, first_column = tile_n * kTileN;
  const int64_t begin = split * s.split_pixels;
  const int64_t end = begin + s.split_pixels < s.input.pixels ? begin + s.split_pixels : s.input.pixels;

  GradientParts<P, Source, V> a(source, shared, group * s.rows + first_row, s.rows - first_row, begin, end,
                                tile_n == 0);
  Operand<typename P::template Layout<kTileN>, Values<scalar_t>, V> b(
      s.input, input, group, shared + kTileM * kStepBytes, begin, end, first_column);
  WithColumnSums<P> product;
  product.adding = tile_m == 0;
  constexpr int kStep = kDepth<scalar_t>;
  multiply_tiles(product, a, b, static_cast<int>((end - begin + kStep - 1) / kStep));

  const Extent extent{s.rows - first_row < kTileK ? s.rows - first_row : kTileK,
                      s.columns - first_column < kTileN ? s.columns - first_column : kTileN};
  if (tile_n == 0) a.write_sums(reinterpret_cast<double*>(shared), partial, split);
  if (tile_m == 0) {
    product.write_sums(reinterpret_cast<float*>(shared),
                       partial.columns + (int64_t{split} * s.groups + group) * s.columns + first_column,
                       extent.columns);
  }
  const OutputTile<float> tile{reinterpret_cast<float*>(shared)};
  product.for_each([&](int row, int column, const auto& values) { tile.put(row, column, values); });
  __syncthreads();
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t row = (int64_t{split} * 2 + part) * partial.channels + group * s.rows + first_row;
    const OutputTile<float> half{tile.values + part * kTileK * kPitch};
    half.template write<V == 1 ? 1 : kPack<float>>(partial.products + row * s.columns + first_column, s.columns,
                                                   extent);
  }
}

template <class Source, int V>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_grad_weight_kernel(Gather g, Source source, Values<typename Source::scalar_t> input, int64_t split_pixels,
                                 GradWeightPartial partial) {
  constexpr int kAcross = kTileN / V, kDown = kThreads / kAcross;
  __shared__ double shared[V * kThreads];
  const int y = threadIdx.x / kAcross, channel = (blockIdx.x * kAcross + threadIdx.x % kAcross) * V;
  const int taps = g.kernel[0] * g.kernel[1], split = blockIdx.z;
  const bool adding = blockIdx.y == 0;
  const int64_t begin = split * split_pixels, end = begin + split_pixels < g.pixels ? begin + split_pixels : g.pixels;
  float sum_g[V] = {}, sum_gd[V] = {}, gx[V] = {}, dx[V] = {}, sum_x[V] = {};
  if (channel < g.channels) {
    Column tap;
    tap.r = blockIdx.y / g.kernel[1];
    tap.s = blockIdx.y % g.kernel[1];
    Pixel pixel(g, begin + y, end);
    for (int64_t p = begin + y; p < end; p += kDown, pixel.advance(g, kDown)) {
      const int64_t offset = locate(g, pixel, tap);
      if (offset < 0 && !adding) continue;
      float grad[V], d[V], s[V], x[V] = {};
      source.template parts<V>(source.template load<V>(p * g.channels + channel), channel, grad, d);
      source.template guess<V>(channel, s);
      if (offset >= 0) input.template values<V>(input.template load<V>(offset + channel), channel, x);
#pragma unroll
      for (int l = 0; l < V; ++l) {
        sum_g[l] += grad[l];
        sum_gd[l] += grad[l] * d[l];
        gx[l] += (grad[l] - s[l]) * x[l];
        dx[l] += d[l] * x[l];
        sum_x[l] += x[l];
      }
    }
  }
  constexpr int kRow = kAcross + 16 / V;  // so that 16 neighbouring channels lie in different banks
  const auto total = [&](const float (&sum)[V], auto write) {
    double result[V];
    add_up(sum, kAcross, shared, result);
    __syncthreads();
    if (y == 0) {
#pragma unroll
      for (int l = 0; l < V; ++l) shared[l * kRow + threadIdx.x] = result[l];
    }
    __syncthreads();
    const int c = blockIdx.x * kTileN + threadIdx.x;
    if (threadIdx.x < kTileN && c < g.channels) write(c, shared[threadIdx.x % V * kRow + threadIdx.x / V]);
    __syncthreads();
  };
  const auto product = [&](int part) {
    return [&, part](int c, double x) {
      partial.products[((int64_t{split} * 2 + part) * taps + blockIdx.y) * g.channels + c] = static_cast<float>(x);
    };
  };
  total(gx, product(0));
  total(dx, product(1));
  total(sum_x, [&](int c, double x) {
    partial.columns[(int64_t{split} * taps + blockIdx.y) * g.channels + c] = static_cast<float>(x);
  });
  if (!adding) return;
  total(sum_g, [&](int c, double x) {
    partial.sum(0, c, split) = x;
    partial.sum(2, c, split) = 0;  // nothing is rounded
  });
  total(sum_gd, [&](int c, double x) { partial.sum(1, c, split) = x; });
}

// dw = a·(gᵀX) + b·(dᵀX) + c·(1ᵀX), splits in their order; d was made with the rounded mean. A thread per entry, in the
// order of the products: rows (K/G; depthwise taps) of `columns`, `groups` times.
template <bool depthwise, typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    conv_combine_weight_kernel(GradWeightPartial partial, int rows, int columns, int groups,
                               const double* __restrict__ mean, const double* __restrict__ taken,
                               const double* __restrict__ a, const double* __restrict__ b, const double* __restrict__ c,
                               scalar_t* __restrict__ dw) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, size = int64_t{groups} * rows * columns;
  if (i >= size) return;
  const int64_t row = i / columns, column = i % columns;
  const int k = static_cast<int>(depthwise ? column : row);
  const int64_t x_size = depthwise ? size : int64_t{groups} * columns,
                x_at = depthwise ? i : row / rows * columns + column;
  double g = 0, d = 0, x = 0;
  for (int64_t split = 0; split < partial.splits; ++split) {
    g += partial.products[2 * split * size + i];
    d += partial.products[(2 * split + 1) * size + i];
    x += partial.columns[split * x_size + x_at];
  }
  const double constant = c[k] + b[k] * (static_cast<float>(mean[k]) - mean[k]) + a[k] * taken[k];
  dw[i] = from_acc<scalar_t>(static_cast<float>(a[k] * g + b[k] * d + constant * x));
}

}  // namespace convbn
