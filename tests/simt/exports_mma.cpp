// The wrappers of csrc/cuda/mma.cuh one by one, for test_simt_mma.py: fragments filled and read by the tables of the
// PTX manual, element by element.
#include "api.h"
#include "mma.cuh"
#include "pack.cuh"

namespace {

using namespace convbn;

template <typename scalar_t>
uint32_t word_of(const scalar_t* first, int step) {  // a tf32, or two values `step` apart
  if constexpr (sizeof(scalar_t) == 4) {
    uint32_t word;
    memcpy(&word, first, sizeof word);
    return word;
  } else {
    uint16_t low, high;
    memcpy(&low, first, sizeof low);
    memcpy(&high, first + step, sizeof high);
    return low | static_cast<uint32_t>(high) << 16;
  }
}

// C (blocks, 16, 8) = A (blocks, 16, K) B (blocks, K, 8) + C
template <typename scalar_t>
__global__ void mma_kernel(const scalar_t* A, const scalar_t* B, float* C) {
  constexpr int kWord = 4 / sizeof(scalar_t), kDepth = 8 * kWord;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  A += blockIdx.x * 16 * kDepth;
  B += blockIdx.x * 8 * kDepth;
  C += blockIdx.x * 16 * 8;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = word_of(A + (g + 8 * (i % 2)) * kDepth + (t + 4 * (i / 2)) * kWord, 1);
  for (int i = 0; i < 2; ++i) b[i] = word_of(B + (t + 4 * i) * kWord * 8 + g, 8);
  for (int i = 0; i < 4; ++i) c[i] = C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  mma<scalar_t>(c, a, b);
  for (int i = 0; i < 4; ++i) C[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

// out (32 lanes, 4) = the words that each lane gets of `in`, 32 rows of 16 bytes.
template <bool transposed>
__global__ void ldmatrix_kernel(const uint4* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  if constexpr (transposed) {
    ldmatrix_x4_trans(r, rows + threadIdx.x);
  } else {
    ldmatrix_x4(r, rows + threadIdx.x);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

__global__ void round_kernel(const uint32_t* in, uint32_t* out) { out[threadIdx.x] = round_to_tf32(in[threadIdx.x]); }

// out = in reversed by chunks of 16 bytes, in two groups; chunks from `valid` on are zeros.
__global__ void cp_async_kernel(const uint4* in, uint4* out, int valid) {
  __shared__ uint4 chunks[64];
  for (unsigned i = threadIdx.x; i < 64; i += 32) {
    cp_async16(chunks + i, in + i, static_cast<int>(i) < valid);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();
  out[63 - threadIdx.x] = chunks[threadIdx.x ^ 1];  // the first group
  cp_async_wait<0>();
  __syncthreads();
  out[31 - threadIdx.x] = chunks[32 + (threadIdx.x ^ 1)];
}

}  // namespace

SIMT_API void mma_tf32(const float* A, const float* B, float* C, int64_t blocks) {
  CONVBN_LAUNCH(mma_kernel<float>, blocks, 32, 0, nullptr, A, B, C);
}
SIMT_API void mma_fp16(const __half* A, const __half* B, float* C, int64_t blocks) {
  CONVBN_LAUNCH(mma_kernel<__half>, blocks, 32, 0, nullptr, A, B, C);
}
SIMT_API void mma_bf16(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int64_t blocks) {
  CONVBN_LAUNCH(mma_kernel<__nv_bfloat16>, blocks, 32, 0, nullptr, A, B, C);
}
SIMT_API void ldmatrix(const uint4* in, uint32_t* out, int64_t transposed) {
  if (transposed) {
    CONVBN_LAUNCH(ldmatrix_kernel<true>, 1, 32, 0, nullptr, in, out);
  } else {
    CONVBN_LAUNCH(ldmatrix_kernel<false>, 1, 32, 0, nullptr, in, out);
  }
}
SIMT_API void round_tf32(const uint32_t* in, uint32_t* out) { CONVBN_LAUNCH(round_kernel, 1, 32, 0, nullptr, in, out); }
SIMT_API void cp_async(const uint4* in, uint4* out, int64_t valid) {
  CONVBN_LAUNCH(cp_async_kernel, 1, 32, 0, nullptr, in, out, static_cast<int>(valid));
}
