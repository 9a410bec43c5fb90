// Krylov kernels as the torch side sees them (formulas and meaning: ../krylov.h, ../gmres.h). Neither torch nor CUDA
// headers. Nothing here waits for the device, so every launcher may be captured in a CUDA graph.
#pragma once
#include <cstdint>

#include "../arnoldi.h"
#include "../padding.h"

struct CUstream_st;

namespace convbn {

constexpr int kMaxBasisBlocks = 32;  // they double in size
constexpr int kKrylovChunk = 1024;   // scalars of a vector that a block of threads owns

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
  int64_t systems = 0;            // A
  int64_t n = 0;                  // scalars per vector
  const int64_t* rows = nullptr;  // (A,) slots; null: 0 … A − 1

  CONVBN_HOST_DEVICE int chunks() const { return static_cast<int>((n + kKrylovChunk - 1) / kKrylovChunk); }
};

// Doubles of scratch memory that orthonormalize and norms (k = 0) need.
int64_t krylov_scratch_size(const KrylovProblem& problem, int k);

// v_k ← (I − V Vᵀ)w / ‖(I − V Vᵀ)w‖ with k vectors; H (A, k + 2) complex = Vᵀw, ‖(I − V Vᵀ)w‖, ‖w‖.
void launch_krylov_orthonormalize(const KrylovProblem& problem, const KrylovBasis& V, int k, const void* w,
                                  double* scratch, double* H, CUstream_st* stream);
// out (A, n) = Σ_j y_j v_j with y (A, K) complex, of which the real part counts.
void launch_krylov_combine(const KrylovProblem& problem, const KrylovBasis& V, int K, const double* y, void* out,
                           CUstream_st* stream);
// norms (A,) of the rows of x (A, n).
void launch_krylov_norms(const KrylovProblem& problem, const void* x, double* scratch, double* norms,
                         CUstream_st* stream);

// Column j = k − 1 of every system, as orthonormalize left it in H (S, k + 2), into the small problems (S, size) of
// arnoldi.h; column 0 begins them. limits (S, 2): target in units of β, most steps. Systems that are done stay as they
// are.
void launch_krylov_rotate(int64_t systems, int k, double eps, const double* H, const double* limits, int restart,
                          double* small, CUstream_st* stream);
// y (S, K) complex: the minimisers of the small problems, zero behind their steps.
void launch_krylov_solve(int64_t systems, const double* small, int restart, int K, double* y, CUstream_st* stream);

// A convolution as a map of flattened images, up to three spatial axes (leading ones of size 1), any stride.
struct ConvStencil {
  int channels_in, channels_out, groups;
  int in[3], out[3], kernel[3], stride[3], dilation[3], before[3];  // before: padding in front
  PaddingMode mode;
  const void* weight;     // (C_out, C_in/groups, *kernel)
  const void* row_scale;  // (C_out·out,) or null: D of D A
};

// A whole restart cycle for each system, one block of threads each: r → u = V y, and the small problem.
struct GmresCycle {
  bool is_double;
  int64_t systems;
  int n, restart;
  double eps;
  const void* r;         // (S, n), norm about one
  const double* limits;  // (S, 2) as above
  int near;              // basis vectors that stay in shared memory: gmres_cycle_near
  void* far;             // (S, restart + 1 − near, n): the others
  double* small;         // (S, size)
  void* u;               // (S, n)
};
// Vectors of the basis that fit into `shared_bytes` beside the small problem; −1 when that does not fit itself.
int gmres_cycle_near(bool is_double, int64_t n, int64_t restart, int64_t shared_bytes);
void launch_gmres_cycle(const GmresCycle& cycle, const ConvStencil& A, CUstream_st* stream);

}  // namespace convbn
