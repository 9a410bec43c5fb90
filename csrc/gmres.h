// Restarted GMRES for a batch of systems A x_s = b_s that share A, in lockstep, right-preconditioned:
//
//   x = x₀ + M u with u in the Krylov space of A M and r = b − A x₀, so that the residual monitored is the true one.
//
// M ≈ A⁻¹ (SciPy's sense); with `flexible`, M may differ from step to step (FGMRES: the vectors M v_j are kept).
// Every system has its own Hessenberg matrix, target and status, and leaves the batch when it is done: its result is
// the one that it would have alone. Saad & Schultz (1986); Saad (1993) for the flexible variant; Giraud et al. (2005)
// for CGS2.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "linear_map.h"

namespace convbn {

enum class Status {
  converged,   // the true residual ‖b − A x‖ meets max(rtol·‖b‖, atol)
  maxiter,     // the allowed Arnoldi steps or cycles are used up
  stagnation,  // a cycle no longer lowers the true residual: short restart, or the accuracy of the dtype is reached
  breakdown,   // the Krylov space is exhausted and rounding keeps the residual above the target
  singular,    // the Krylov space is exhausted and A M is singular on it: no solution there
  nonfinite,   // NaN or Inf in b, x0, A or M
};
const char* name(Status status);

struct GmresOptions {
  double rtol = 1e-5, atol = 0;
  int64_t restart = 0;          // Arnoldi steps per cycle; 0: n
  int64_t maxiter = 0;          // Arnoldi steps in all; 0: no limit
  int64_t max_cycles = 0;       // 0: no limit
  int64_t max_basis_bytes = 0;  // ceiling for the basis; 0: none. Lowers restart where it binds
  bool flexible = false;
  double least_reduction = 0.999;  // a cycle must lower the true residual at least by this factor, or it is stagnation
  // Dtype of the basis, of A and M in the Arnoldi loop. b, x and the true residual keep the dtype of b, so float32
  // inside float64 is iterative refinement: each cycle gains what float32 can, and the end-to-end accuracy is that of
  // float64.
  std::optional<at::ScalarType> inner_dtype;
  std::function<void()> interrupt;  // called now and then; may throw: the solve ends with that exception
  // After each Arnoldi step: `norms()` gives the residual norms (B,) as the recurrence knows them, `vectors()` the
  // residuals themselves (B, n), for one pass over the basis. May throw: the solve ends with that exception.
  using Lazy = std::function<at::Tensor()>;
  std::function<void(const Lazy& norms, const Lazy& vectors)> on_step;
  std::function<void(const at::Tensor& x)> on_cycle;  // after each cycle, with all iterates (B, n)
};

struct GmresResult {
  at::Tensor x;                     // (B, n)
  std::vector<Status> status;       // per system, as everything below
  std::vector<int64_t> iterations;  // Arnoldi steps
  at::Tensor residual;              // (B,) float64: true ‖b − A x‖
  std::vector<std::vector<double>>
      history;  // residual norm at the start and after each step; true at the ends of cycles
  int64_t cycles = 0;
  int64_t restart = 0;         // as used: min(n, restart, what max_basis_bytes allows)
  bool basis_limited = false;  // max_basis_bytes lowered it
};

// b (B, n); x0 (B, n) or none (zeros), not changed; M may be null. Raises ValueError for shapes that do not match.
GmresResult gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0, const LinearMap* M,
                  const GmresOptions& options);

// gmres for real systems with the decisions of a cycle on the device: the host learns at its end what came of it, not
// step by step, so on_step is refused. gmres takes this way itself where b is not on the CPU (device_gmres.cpp).
GmresResult device_gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0,
                         const LinearMap* M, const GmresOptions& options);

// The same for systems that help each other: one Krylov space, spanned by the blocks of all of them (block_gmres.cpp).
// An iteration is a block step; restart bounds the dimension of the space. Systems share their fate within a cycle, and
// verdicts are per system.
GmresResult block_gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0,
                        const LinearMap* M, const GmresOptions& options);

// block_gmres as device_gmres is gmres (device_block_gmres.cpp).
GmresResult device_block_gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0,
                               const LinearMap* M, const GmresOptions& options);

}  // namespace convbn
