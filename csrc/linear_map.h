// A linear map on a batch of flattened vectors, (B, n) → (B, m), one row per system and the same map for every row.
//
// Solvers see operators and preconditioners only through this class. GMRES calls `apply` with the rows that still
// iterate, so B shrinks during a solve, and it may call it in float32 and float64 alike when the map says that it can.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "convolution.h"

namespace convbn {

struct LinearMap {
  virtual ~LinearMap() = default;

  // v (B, n) → A v (B, m), row by row. The result must be a fresh tensor or one that the map does not reuse before the
  // caller is done with it; it may alias nothing that the caller owns except v itself (identity).
  virtual at::Tensor apply(const at::Tensor& v) const = 0;

  // u (B, m) → Aᴴ u (B, n): ⟨A v, u⟩ = ⟨v, Aᴴ u⟩.
  virtual at::Tensor apply_adjoint(const at::Tensor& u) const = 0;

  // The map as a convolution, for backends that build one into their kernels; none if it is something else.
  virtual std::optional<Convolution> convolution() const { return std::nullopt; }
};

}  // namespace convbn
