// Kernels with one planted error each, which the harness must report, and their clean twins, which it must not.
#include "api.h"
#include "device.cuh"
#include "mma.cuh"

using convbn::cp_async16;
using convbn::cp_async_commit;
using convbn::cp_async_wait;
using convbn::kFullMask;

namespace {

enum class Bug { none, missing_first_barrier, missing_second_barrier, halo_off_by_one };

constexpr int kTile = 8;

// y = w ⋆ x for one image (C, H, W) and one 3×3 filter, padding 1; a tile with its halo passes through shared memory
// per channel.
template <Bug bug>
__global__ void conv3x3_kernel(const float* __restrict__ x, const float* __restrict__ w, float* __restrict__ y, int C,
                               int H, int W) {
  __shared__ float tile[kTile + 2][kTile + 2];
  const int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
  float sum = 0;
  for (int c = 0; c < C; ++c) {
    for (int i = threadIdx.y * kTile + threadIdx.x; i < (kTile + 2) * (kTile + 2); i += kTile * kTile) {
      const int r = i / (kTile + 2), s = i % (kTile + 2), h = blockIdx.y * kTile + r - 1,
                v = blockIdx.x * kTile + s - 1;
      const bool inside = h >= 0 && h < H + (bug == Bug::halo_off_by_one) && v >= 0 && v < W;
      tile[r][s] = inside ? x[(c * H + h) * W + v] : 0.f;
    }
    if (bug != Bug::missing_first_barrier) __syncthreads();
    for (int r = 0; r < 3; ++r) {
      for (int s = 0; s < 3; ++s) sum += tile[threadIdx.y + r][threadIdx.x + s] * w[(c * 3 + r) * 3 + s];
    }
    if (bug != Bug::missing_second_barrier) __syncthreads();
  }
  if (row < H && column < W) y[row * W + column] = sum;
}

template <Bug bug>
void conv3x3(const float* x, const float* w, float* y, int C, int H, int W) {
  const dim3 grid((W + kTile - 1) / kTile, (H + kTile - 1) / kTile);
  CONVBN_LAUNCH(conv3x3_kernel<bug>, grid, dim3(kTile, kTile), 0, nullptr, x, w, y, C, H, W);
}

// out = inᵀ, (n, n), in 32×32 tiles. Through shared memory with rows of 32 + pad words: pad 0 puts a column into one
// bank.
template <int pad>
__global__ void transpose_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  CONVBN_DYNAMIC_SHARED(float, tile);
  const int x = blockIdx.x * 32, y = blockIdx.y * 32;
  for (int j = threadIdx.y; j < 32; j += blockDim.y)
    tile[j * (32 + pad) + threadIdx.x] = in[(y + j) * n + x + threadIdx.x];
  __syncthreads();
  for (int j = threadIdx.y; j < 32; j += blockDim.y) {
    out[(x + j) * n + y + threadIdx.x] = tile[threadIdx.x * (32 + pad) + j];
  }
}

__global__ void transpose_uncoalesced_kernel(const float* __restrict__ in, float* __restrict__ out, int n) {
  const int x = blockIdx.x * 32 + threadIdx.x;
  for (int j = threadIdx.y; j < 32; j += blockDim.y)
    out[x * n + blockIdx.y * 32 + j] = in[(blockIdx.y * 32 + j) * n + x];
}

__global__ void dynamic_overrun_kernel(float* out) {
  CONVBN_DYNAMIC_SHARED(float, s);
  s[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x + 1];
}

// 15 rows of 16 are written; with 18 columns each row runs into the next.
__global__ void static_overrun_kernel(float* out, int columns) {
  __shared__ float s[16][17];
  for (int j = 0; j < columns; ++j) s[threadIdx.x][j] = 1;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x][0];
}

// Reverse 32 values through shared memory; only __syncwarp makes the writes visible.
template <bool synchronised>
__global__ void reverse_kernel(float* out) {
  __shared__ float s[32];
  s[threadIdx.x] = threadIdx.x;
  if (synchronised) __syncwarp();
  const float zero = __shfl_xor_sync(kFullMask, 0.f, 1);
  out[threadIdx.x] = s[31 - threadIdx.x] + zero;
}

// Each half of the warp reverses its own 16 values, or by mistake reads the other half's, which its __syncwarp does not
// cover.
template <bool mistaken>
__global__ void half_warp_kernel(float* out) {
  __shared__ float s[32];
  const unsigned half = threadIdx.x / 16, mask = 0xffffu << (16 * half);
  s[threadIdx.x] = threadIdx.x;
  __syncwarp(mask);
  out[threadIdx.x] = s[mistaken ? 31 - threadIdx.x : half * 16 + 15 - threadIdx.x % 16];
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

// Lane 31 waits at the barrier, the others for lane 31.
__global__ void deadlock_kernel(float* out) {
  if (threadIdx.x == 31) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}

__global__ void exited_lane_kernel(float* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  out[threadIdx.x] = __shfl_down_sync(kFullMask, 1.f, 1);
}

// Lanes may leave before a barrier, and a shuffle may name only those that stay.
__global__ void early_exit_kernel(float* out) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  const unsigned mask = threadIdx.x < 32 ? kFullMask : 0xffffu;
  out[threadIdx.x] = __shfl_sync(mask, static_cast<float>(threadIdx.x), 0, 16);
}

__global__ void block_race_kernel(float* out) { out[threadIdx.x] = blockIdx.x; }

template <bool complete>
__global__ void uninitialised_kernel(float* out) {
  __shared__ float s[64];
  if (complete || threadIdx.x != 17) s[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}

// Each thread copies 16 bytes and reads its neighbour's: the wait must come before the barrier.
enum class Await { never, after_barrier, before_barrier };
template <Await await>
__global__ void copy_kernel(float* out) {
  __shared__ uint4 chunks[16];
  cp_async16(chunks + threadIdx.x, out + 4 * threadIdx.x, true);
  cp_async_commit();
  if (await == Await::before_barrier) cp_async_wait<0>();
  __syncthreads();
  if (await == Await::after_barrier) cp_async_wait<0>();
  out[threadIdx.x] = chunks[15 - threadIdx.x].x != 0;
}

__global__ void misaligned_kernel(const float* in, float* out) {
  struct alignas(8) Pair {
    float x, y;
  };
  const Pair pair = *reinterpret_cast<const Pair*>(in + 1);
  out[0] = pair.x + pair.y;
}

// out += Σ in: shuffles within a warp, shared memory between warps, one atomic per block.
__global__ void sum_kernel(const float* __restrict__ in, float* out, int n) {
  __shared__ float part[8];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += in[i];
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(kFullMask, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x) return;
  for (unsigned i = 1; i < blockDim.x / 32; ++i) sum += part[i];
  atomicAdd(out, sum);
}

}  // namespace

SIMT_API void clean_conv3x3(const float* x, const float* w, float* y, int C, int H, int W) {
  conv3x3<Bug::none>(x, w, y, C, H, W);
}
SIMT_API void missing_first_barrier(const float* x, const float* w, float* y, int C, int H, int W) {
  conv3x3<Bug::missing_first_barrier>(x, w, y, C, H, W);
}
SIMT_API void missing_second_barrier(const float* x, const float* w, float* y, int C, int H, int W) {
  conv3x3<Bug::missing_second_barrier>(x, w, y, C, H, W);
}
SIMT_API void halo_off_by_one(const float* x, const float* w, float* y, int C, int H, int W) {
  conv3x3<Bug::halo_off_by_one>(x, w, y, C, H, W);
}
SIMT_API void clean_transpose(const float* in, float* out, int n) {
  CONVBN_LAUNCH(transpose_kernel<1>, dim3(n / 32, n / 32), dim3(32, 8), 32 * 33 * sizeof(float), nullptr, in, out, n);
}
SIMT_API void transpose_bank_conflict(const float* in, float* out, int n) {
  CONVBN_LAUNCH(transpose_kernel<0>, dim3(n / 32, n / 32), dim3(32, 8), 32 * 32 * sizeof(float), nullptr, in, out, n);
}
SIMT_API void transpose_uncoalesced(const float* in, float* out, int n) {
  CONVBN_LAUNCH(transpose_uncoalesced_kernel, dim3(n / 32, n / 32), dim3(32, 8), 0, nullptr, in, out, n);
}
SIMT_API void dynamic_overrun(float* out) {
  CONVBN_LAUNCH(dynamic_overrun_kernel, 1, 32, 32 * sizeof(float), nullptr, out);
}
SIMT_API void static_overrun(float* out) { CONVBN_LAUNCH(static_overrun_kernel, 1, 15, 0, nullptr, out, 18); }
SIMT_API void clean_static(float* out) { CONVBN_LAUNCH(static_overrun_kernel, 1, 16, 0, nullptr, out, 17); }
SIMT_API void shuffle_as_barrier(float* out) { CONVBN_LAUNCH(reverse_kernel<false>, 1, 32, 0, nullptr, out); }
SIMT_API void clean_reverse(float* out) { CONVBN_LAUNCH(reverse_kernel<true>, 1, 32, 0, nullptr, out); }
SIMT_API void half_warp_mistaken(float* out) { CONVBN_LAUNCH(half_warp_kernel<true>, 1, 32, 0, nullptr, out); }
SIMT_API void clean_half_warp(float* out) { CONVBN_LAUNCH(half_warp_kernel<false>, 1, 32, 0, nullptr, out); }
SIMT_API void divergent_barrier(float* out) { CONVBN_LAUNCH(divergent_barrier_kernel, 1, 32, 0, nullptr, out); }
SIMT_API void deadlock(float* out) { CONVBN_LAUNCH(deadlock_kernel, 1, 32, 0, nullptr, out); }
SIMT_API void exited_lane(float* out) { CONVBN_LAUNCH(exited_lane_kernel, 1, 32, 0, nullptr, out, 20); }
SIMT_API void clean_early_exit(float* out) { CONVBN_LAUNCH(early_exit_kernel, 1, 64, 0, nullptr, out); }
SIMT_API void block_race(float* out) { CONVBN_LAUNCH(block_race_kernel, 2, 32, 0, nullptr, out); }
SIMT_API void uninitialised_shared(float* out) { CONVBN_LAUNCH(uninitialised_kernel<false>, 1, 64, 0, nullptr, out); }
SIMT_API void clean_initialised(float* out) { CONVBN_LAUNCH(uninitialised_kernel<true>, 1, 64, 0, nullptr, out); }
SIMT_API void copy_never_awaited(float* out) { CONVBN_LAUNCH(copy_kernel<Await::never>, 1, 16, 0, nullptr, out); }
SIMT_API void copy_awaited_late(float* out) {
  CONVBN_LAUNCH(copy_kernel<Await::after_barrier>, 1, 16, 0, nullptr, out);
}
SIMT_API void clean_copy(float* out) { CONVBN_LAUNCH(copy_kernel<Await::before_barrier>, 1, 16, 0, nullptr, out); }
SIMT_API void misaligned(const float* in, float* out) { CONVBN_LAUNCH(misaligned_kernel, 1, 1, 0, nullptr, in, out); }
SIMT_API void clean_sum(const float* in, float* out, int n) {
  CONVBN_LAUNCH(sum_kernel, 3, 256, 0, nullptr, in, out, n);
}
SIMT_API void bad_launch(float* out) { CONVBN_LAUNCH(block_race_kernel, 1, 2048, 0, nullptr, out); }
