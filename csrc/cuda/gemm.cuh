// One block's share of a matrix product, C (128, 64) = Σ_k A (128, k) B (64, k)ᵀ, in steps of 64 bytes of k.
//
// Operands pass through shared memory in tiles of 16-byte chunks, kStages of them in flight. Which way a chunk runs
// follows memory: along k where the columns of the gathered matrix are summed over (forward, grad_input), along the
// rows where its pixels are (grad_weight). Chunks are permuted so that neither the copies in, nor ldmatrix, nor the
// loads of the float product meet in a bank.
// 8 warps. Tensor cores: 4 × 2 warps of 32 × 32, as 2 × 4 products of 16 × 8. Float: 16 × 16 threads of 8 × 4.
#pragma once
#include "conv_gather.cuh"
#include "conv_source.cuh"
#include "mma.cuh"

namespace convbn {

constexpr int kTileM = 128, kTileN = 64, kStages = 3, kStepBytes = 64, kChunkBytes = 16;
constexpr int kStageBytes = (kTileM + kTileN) * kStepBytes;

template <typename scalar_t>
constexpr int kDepth = kStepBytes / sizeof(scalar_t);  // k per step

// Where things lie in a tile of `rows` rows.
template <typename scalar, int rows_, bool along_k_>
struct TileLayout {
  using scalar_t = scalar;
  static constexpr int kChunk = kPack<scalar_t>, kRows = rows_;
  static constexpr bool kAlongK = along_k_;
  static constexpr int kLine = kAlongK ? kDepth<scalar_t> / kChunk : kRows / kChunk;  // chunks side by side
  static constexpr int kPerThread = kRows * kStepBytes / kChunkBytes / kThreads;

  // Byte of the chunk that begins at (row, k).
  static __device__ __forceinline__ int chunk(int row, int k) {
    if constexpr (kAlongK) {  // two rows are 128 bytes: 8 rows hold one chunk in 8 different places
      return row * kStepBytes + ((k / kChunk) ^ (row / 2 % 4)) * kChunkBytes;
    } else if constexpr (sizeof(scalar_t) == 2) {  // ldmatrix takes one chunk of each of 8 k
      return (k * kLine + ((row / kChunk) ^ (k % 8))) * kChunkBytes;
    } else {  // a warp takes 8 floats (two chunks) of each of 4 k
      return (k * kLine + ((row / kChunk) ^ (k % 4 * 2))) * kChunkBytes;
    }
  }
  // This thread's i-th chunk.
  static __device__ __forceinline__ int row(int i) {
    const int j = threadIdx.x + i * kThreads;
    return kAlongK ? j / kLine : j % kLine * kChunk;
  }
  static __device__ __forceinline__ int k(int i) {
    const int j = threadIdx.x + i * kThreads;
    return kAlongK ? j % kLine * kChunk : j / kLine;
  }
};

// Brings a gathered matrix into the tiles: element (p, q) with p from first_pixel to end, q from first_column on.
// V = kPack where a chunk lies in one tap and is aligned, else 1: scalar by scalar.
template <class Layout, class Source, int V>
struct Operand {
  using scalar_t = typename Layout::scalar_t;
  static constexpr int kChunk = Layout::kChunk, kCount = Layout::kPerThread;
  static constexpr bool kWhole = V == kChunk, kAsync = kWhole && Source::kDirect;

  const Gather& gather;
  const Source source;
  const int64_t group_offset;  // in scalars, to the group's first channel of the image
  char* const tiles;
  Column column;  // all chunks of a thread begin in the same one
  Pixel pixel[kCount];
  typename Source::template Raw<kChunk> raw[kAsync ? 1 : kCount];  // on the way, not yet in shared memory
  unsigned valid = 0;
  int channel = 0;

  __device__ __forceinline__ Operand(const Gather& g, const Source& s, int group, char* shared, int64_t first_pixel,
                                     int64_t end, int first_column)
      : gather(g), source(s), group_offset(int64_t{group} * g.per_group), tiles(shared) {
    column = Column(g, first_column + (Layout::kAlongK ? Layout::k(0) : Layout::row(0)));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pixel[i] = Pixel(g, first_pixel + (Layout::kAlongK ? Layout::row(i) : Layout::k(i)), end);
    }
  }

  __device__ __forceinline__ char* tile(int stage) const { return tiles + stage * kStageBytes; }

  __device__ __forceinline__ void fetch(int stage) {
    channel = static_cast<int>(group_offset) + column.c;
    valid = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kAsync) {
        const int64_t offset = locate(gather, pixel[i], column);
        cp_async16(tile(stage) + Layout::chunk(Layout::row(i), Layout::k(i)),
                   source.x + (offset < 0 ? 0 : group_offset + offset), offset >= 0);
      } else if constexpr (kWhole) {
        const int64_t offset = locate(gather, pixel[i], column);
        if (offset >= 0) raw[i] = source.template load<V>(group_offset + offset);
        valid |= (offset >= 0 ? 1u : 0u) << i;
      } else {
        fetch_scalars(stage, i);
      }
      if constexpr (!Layout::kAlongK) pixel[i].advance(gather, kDepth<scalar_t>);
    }
    if constexpr (Layout::kAlongK) column.advance(gather, kDepth<scalar_t>);
  }

  __device__ __forceinline__ void fetch_scalars(int stage, int i) {
    Pack<scalar_t, kChunk> pack;
    Column q = column;
#pragma unroll
    for (int l = 0; l < kChunk; ++l) {
      const int64_t offset = locate(gather, pixel[i], q);
      float x[1] = {0};
      if (offset >= 0) {
        source.template values<1>(source.template load<1>(group_offset + offset), static_cast<int>(group_offset) + q.c,
                                  x);
      }
      pack.value[l] = from_acc<scalar_t>(x[0]);
      q.advance(gather, 1);
    }
    put(stage, i, pack);
  }

  // After the product that hides the loads: what was fetched, computed and put into its tile.
  __device__ __forceinline__ void store(int stage) {
    if constexpr (kWhole && !kAsync) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        float x[kChunk] = {};
        if (valid >> i & 1) source.template values<kChunk>(raw[i], channel, x);
        Pack<scalar_t, kChunk> pack;
#pragma unroll
        for (int l = 0; l < kChunk; ++l) pack.value[l] = from_acc<scalar_t>(x[l]);
        put(stage, i, pack);
      }
    }
  }

  __device__ __forceinline__ void put(int stage, int i, const Pack<scalar_t, kChunk>& pack) {
    uint4 words;
    memcpy(&words, &pack, sizeof words);
    *reinterpret_cast<uint4*>(tile(stage) + Layout::chunk(Layout::row(i), Layout::k(i))) = words;
  }
};

// acc += A Bᵀ of one step, on tensor cores.
template <typename scalar_t, bool along_k>
struct TensorProduct {
  template <int rows>
  using Layout = TileLayout<scalar_t, rows, along_k>;
  static constexpr bool kTensor = true;
  static constexpr int kFragmentDepth = 32 / sizeof(scalar_t);
  float acc[2][4][4] = {};

  static __device__ __forceinline__ float rounded(scalar_t x) {  // what is multiplied
    if constexpr (sizeof(scalar_t) == 4) {
      uint32_t word;
      memcpy(&word, &x, sizeof word);
      word = round_to_tf32(word);
      memcpy(&x, &word, sizeof word);
    }
    return to_acc(x);
  }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kWarp % 4 * 32; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / kWarp / 4 * 32; }

  // Two fragments of 8 rows from row and k on: one_operand (A) orders them rows first, else (B) k first.
  template <class L, bool is_a>
  static __device__ __forceinline__ void load(uint32_t (&r)[4], const char* tile, int row, int k) {
    constexpr int kChunk = L::kChunk;
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, low = lane % 8;
    const int second = lane / 8 % 2, third = lane / 16;  // of the matrix whose row this lane points to
    if constexpr (along_k) {
      ldmatrix_x4(r, tile + L::chunk(row + low + 8 * (is_a ? second : third), k + kChunk * (is_a ? third : second)));
    } else if constexpr (sizeof(scalar_t) == 2) {
      ldmatrix_x4_trans(r, tile + L::chunk(row + 8 * (is_a ? second : third), k + low + 8 * (is_a ? third : second)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = row + g + 8 * (is_a ? i % 2 : i / 2);
        const char* chunk = tile + L::chunk(at / kChunk * kChunk, k + t + 4 * (is_a ? i / 2 : i % 2));
        r[i] = *reinterpret_cast<const uint32_t*>(chunk + at % kChunk * sizeof(scalar_t));
      }
    }
    if constexpr (sizeof(scalar_t) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = round_to_tf32(r[i]);
    }
  }

  __device__ __forceinline__ void multiply(const char* tile_a, const char* tile_b) {
#pragma unroll
    for (int k = 0; k < kDepth<scalar_t>; k += kFragmentDepth) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load<Layout<kTileM>, true>(a[i], tile_a, first_row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < 2; ++j) load<Layout<kTileN>, false>(b[j], tile_b, first_column() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<scalar_t>(acc[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
      }
    }
  }

  // f(row, column, values of neighbouring columns)
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float values[] = {acc[i][j][2 * half], acc[i][j][2 * half + 1]};
          f(first_row() + 16 * i + lane / 4 + 8 * half, first_column() + 8 * j + lane % 4 * 2, values);
        }
      }
    }
  }
};

// The same in float. A thread's rows and columns are 16 apart along k, else in runs of 4: a chunk each. The products of
// a step are summed by themselves, so that rounding grows with the number of steps, not of products.
template <bool along_k>
struct FloatProduct {
  template <int rows>
  using Layout = TileLayout<float, rows, along_k>;
  static constexpr bool kTensor = false;
  float acc[8][4] = {};

  static __device__ __forceinline__ float rounded(float x) { return x; }
  // A warp is 4 threads high and 8 wide.
  static __device__ __forceinline__ int y() { return threadIdx.x / kWarp / 2 * 4 + threadIdx.x % kWarp / 8; }
  static __device__ __forceinline__ int x() { return threadIdx.x / kWarp % 2 * 8 + threadIdx.x % 8; }

  static __device__ __forceinline__ void load(float (&v)[4], const char* chunk) {
    load_pack<4>(reinterpret_cast<const float*>(chunk), 4, v);
  }

  __device__ __forceinline__ void multiply(const char* tile_a, const char* tile_b) {
    using A = Layout<kTileM>;
    using B = Layout<kTileN>;
    float sum[8][4] = {};
    if constexpr (along_k) {
#pragma unroll
      for (int k = 0; k < kDepth<float>; k += 4) {
        float b[4][4];
#pragma unroll
        for (int j = 0; j < 4; ++j) load(b[j], tile_b + B::chunk(x() + 16 * j, k));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float a[4];
          load(a, tile_a + A::chunk(y() + 16 * i, k));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int l = 0; l < 4; ++l) sum[i][j] += a[l] * b[j][l];
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kDepth<float>; ++k) {
        float a[2][4], b[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load(a[i], tile_a + A::chunk(4 * y() + 64 * i, k));
        load(b, tile_b + B::chunk(4 * x(), k));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += a[i / 4][i % 4] * b[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i][j] += sum[i][j];
    }
  }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (along_k) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float value[] = {acc[i][j]};
          f(y() + 16 * i, x() + 16 * j, value);
        }
      } else {
        f(4 * y() + 64 * (i / 4) + i % 4, 4 * x(), acc[i]);
      }
    }
  }
};

template <typename scalar_t, bool tensor_cores, bool along_k>
using Product = std::conditional_t<tensor_cores, TensorProduct<scalar_t, along_k>, FloatProduct<along_k>>;

// Blocks that must fit on a multiprocessor: two hide each other's barriers, but the float product needs the registers.
template <class P>
constexpr int kGemmResident = P::kTensor ? 2 : 1;

// Leaves the sum in `product` and shared memory free for other use.
template <class P, class A, class B>
__device__ __forceinline__ void multiply_tiles(P& product, A& a, B& b, int steps) {
  const auto fetch = [&](int stage) {
    a.fetch(stage);
    b.fetch(stage);
  };
  const auto store = [&](int stage) {
    a.store(stage);
    b.store(stage);
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      fetch(stage);
      store(stage);
    }
    cp_async_commit();
  }
  int now = 0, next = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // stage `now` is complete, and everybody has finished with stage `next`
    const bool more = step + kStages - 1 < steps;
    if (more) fetch(next);
    cp_async_commit();
    product.multiply(a.tile(now), b.tile(now));
    if (more) store(next);
    now = now + 1 == kStages ? 0 : now + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  __syncthreads();
}

}  // namespace convbn
