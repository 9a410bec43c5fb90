// The PTX of the project, a wrapper per instruction (sm_80 and later). All are executed by whole warps.
//
//   mma<scalar_t>         C (16, 8) += A (16, K) B (K, 8) in float; a step is 32 bytes deep: K = 8 for float (as tf32),
//                         16 for __half and __nv_bfloat16
//   ldmatrix_x4, _trans   four 8×8 matrices of 16-bit values (or 8×4 of 32-bit ones) from shared memory into fragments
//   cp_async16            16 bytes from global to shared memory without a register between; zeros when `valid` is false
//
// Fragments, with g = lane/4 and t = lane%4 (32-bit words; a word holds one tf32 or the two values k, k+1):
//   A   a[0] (row g, word t)   a[1] (g + 8, t)   a[2] (g, t + 4)   a[3] (g + 8, t + 4)
//   B   b[0] (word t, column g)   b[1] (word t + 4, column g)
//   C   c[0], c[1] (row g, columns 2t, 2t + 1)   c[2], c[3] (row g + 8, the same columns)
//   ldmatrix: lanes 8i … 8i + 7 give the addresses of the rows of matrix i, and r[i] is its (row g, word t), or with
//   _trans its (rows 2t and 2t + 1, column g).
// Without nvcc these are functions of tests/simt that follow the same tables.
#pragma once
#include "device.cuh"

namespace convbn {

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

#define CONVBN_MMA(instruction)                                                                                   \
  asm volatile("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <typename scalar_t>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    CONVBN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<scalar_t, __half>) {
    CONVBN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    CONVBN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
}

#undef CONVBN_MMA

// The nearest tf32 (10 bits of mantissa, ties away from zero); mma alone would cut the rest off.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(x)));
  return result;
}

__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until no more than `pending` of this thread's groups are on their way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

using simt::cp_async16;
using simt::cp_async_commit;
using simt::cp_async_wait;
using simt::ldmatrix_x4;
using simt::ldmatrix_x4_trans;
using simt::mma;
using simt::round_to_tf32;

#endif

}  // namespace convbn
