// What csrc/cuda/mma.cuh offers, on the host: tensor-core products, ldmatrix and cp.async.
#pragma once
#include "simt.h"

namespace simt {

// mma.cpp: by the whole warp, one request of memory per matrix.
enum class Operands { tf32, fp16, bf16 };
void multiply(Operands operands, float* c, const uint32_t* a, const uint32_t* b, const void* site);
void load_matrices(uint32_t* r, const void* row, bool transposed, const void* site);

// engine.cpp
void copy_async(void* shared, const void* global, bool valid, const void* site);
void copy_commit();
void copy_wait(unsigned pending);

template <typename scalar_t>
SIMT_CALL void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr Operands operands = std::is_same_v<scalar_t, float>    ? Operands::tf32
                                : std::is_same_v<scalar_t, __half> ? Operands::fp16
                                                                   : Operands::bf16;
  multiply(operands, c, a, b, __builtin_return_address(0));
}

SIMT_CALL inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  load_matrices(r, row, false, __builtin_return_address(0));
}
SIMT_CALL inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  load_matrices(r, row, true, __builtin_return_address(0));
}

inline uint32_t round_to_tf32(uint32_t x) {
  const bool finite = (x & 0x7f800000u) != 0x7f800000u;
  return finite ? (x + 0x1000u) & 0xffffe000u : x;
}

SIMT_CALL inline void cp_async16(void* shared, const void* global, bool valid) {
  copy_async(shared, global, valid, __builtin_return_address(0));
}
inline void cp_async_commit() { copy_commit(); }
template <int pending>
void cp_async_wait() {
  copy_wait(pending);
}

}  // namespace simt
