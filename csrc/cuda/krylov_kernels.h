// The Krylov verbs on CUDA as the torch side sees them (formulas and meaning: ../krylov.h). Neither torch nor CUDA
// headers.
#pragma once
#include <cstdint>

struct CUstream_st;

namespace convbn {

constexpr int kMaxBasisBlocks = 32;  // they double in size

// v_j of slot s is n consecutive scalars at block.begin + (j − block.first)·stride_vector + s·n.
struct KrylovBasis {
  struct Block {
    void* begin;
    int64_t first, stride_vector;
  } block[kMaxBasisBlocks];
  int blocks = 0;
};

struct KrylovProblem {
  bool is_double = false;
  int systems = 0;                // A, a block of threads each
  int64_t n = 0;                  // scalars per vector
  const int64_t* rows = nullptr;  // (A,) slots
};

// v_k ← (I − V Vᵀ)w / ‖(I − V Vᵀ)w‖ with k vectors; H (A, k + 2) = Vᵀw, ‖(I − V Vᵀ)w‖, ‖w‖.
void launch_krylov_orthonormalize(const KrylovProblem& problem, const KrylovBasis& V, int k, const void* w, double* H,
                                  CUstream_st* stream);
// out (A, n) = Σ_j y_j v_j with y (A, K).
void launch_krylov_combine(const KrylovProblem& problem, const KrylovBasis& V, int K, const double* y, void* out,
                           CUstream_st* stream);
// norms (A,) of the rows of x (A, n).
void launch_krylov_norms(const KrylovProblem& problem, const void* x, double* norms, CUstream_st* stream);

}  // namespace convbn
