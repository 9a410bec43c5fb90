// The verbs of Krylov methods on batches of vectors; gmres.cpp is written over these and knows no device.
//
// A basis V holds vectors v₀ … v_{K−1} for each of S systems ("slots") as a list of blocks (count, S, n), n fastest, so
// that it can grow without being copied; V[j] is (S, n). `rows` (A,) int64 names the slots that still iterate, and work
// is done for these alone. Long vectors live in the dtype of the basis, the small things (coefficients, norms) in
// complex128 or float64; all are on the device of the vectors, and no verb makes the host wait for it. Results depend
// on shapes and values, never on the number of threads or on the other systems.
//
// Each verb is an operator convbn_ext::krylov_*; a backend registers its own version (cpu/krylov_cpu.cpp).
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>

#include "convolution.h"

namespace convbn::krylov {

// v_k ← (I − V Vᴴ) w / ‖(I − V Vᴴ) w‖ with the first k vectors as V, by classical Gram–Schmidt applied twice (CGS2).
// w (A, n) is not changed. Returns (A, k + 2) complex128: Vᴴw (k entries), then ‖(I − V Vᴴ) w‖, then ‖w‖.
// k = 0 normalises. Safe against over- and underflow: w is scaled by a power of two where its squares would leave the
// range.
at::Tensor orthonormalize(at::TensorList V, const at::Tensor& rows, int64_t k, const at::Tensor& w);

// Σ_j y_j v_j: y (A, K) complex128 → (A, n). Trailing zeros of a row of y cost nothing.
at::Tensor combine(at::TensorList V, const at::Tensor& rows, const at::Tensor& y);

// ‖x_s‖₂ of each row of x (A, n) → (A,) float64; NaN where x has one. Safe against over- and underflow.
at::Tensor norms(const at::Tensor& x);

// The next three serve a cycle whose decisions fall on the device (device_gmres.cpp). `small` (S, SmallProblem::size)
// float64 holds the least-squares problem of each system (arnoldi.h), `limits` (S, 2) float64 its target in units of β
// and its most steps. Real systems only.

// Appends the column H (S, k + 2) that orthonormalize returned; k = 1 begins. Systems that are done stay as they are.
void rotate(const at::Tensor& small, const at::Tensor& H, const at::Tensor& limits, int64_t restart, double eps);

// y (S, K) complex128 of the steps that each system has made, zeros behind.
at::Tensor solve(const at::Tensor& small, int64_t restart, int64_t K);

// A whole cycle for A = D W, W a convolution and D a diagonal (or none), from residuals r (S, n) of norm one: u = V y
// and the small problems.
std::tuple<at::Tensor, at::Tensor> cycle(const at::Tensor& r, const at::Tensor& limits, int64_t restart, double eps,
                                         const Convolution& A);
bool has_cycle(const at::Tensor& r);  // whether the backend of r offers it

}  // namespace convbn::krylov
