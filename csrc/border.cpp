// A⁻¹ of a convolution that is circular but for its border, as a linear map (capacitance matrix method: Buzbee, Dorr,
// George & Golub, 1971).
//
//   A = C + Rᵀ F with C circular, M = C⁻¹ (one small matrix product per frequency), R the rows at the border and F what
//   A has there that C has not:  A M = I + Rᵀ F M,  so with the border system  K = I + F M Rᵀ  (Woodbury)
//
//   A⁻¹ b = t − M Rᵀ w,          t = M b,   w = K⁻¹ R (A t − b)         as F M b = R (A M − I) b
//   A⁻ᵀ b = t − Mᵀ Aᵀ Rᵀ u + Rᵀ u,  t = Mᵀ b,  u = K⁻ᵀ R t
//
// A border unknown is (channel group, position, channel in group); K is one matrix (b, b) per channel group.
#include <torch/extension.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "interrupt.h"
#include "linear_map.h"

namespace convbn {

using at::Tensor;

namespace {

using LinearMapPtr = std::shared_ptr<LinearMap>;

// LAPACK's row exchanges (k,), 1-based, as the rows that move, and from where.
std::pair<Tensor, Tensor> moves(const Tensor& pivots, int64_t rows) {
  const Tensor host = pivots.cpu();
  std::vector<int64_t> order(rows), to, from;
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = 0; i < host.numel(); ++i) std::swap(order[i], order[host.const_data_ptr<int>()[i] - 1]);
  for (int64_t i = 0; i < rows; ++i)
    if (order[i] != i) to.push_back(i), from.push_back(order[i]);
  return {at::tensor(to, at::kLong).to(pivots.device()), at::tensor(from, at::kLong).to(pivots.device())};
}

// LU with row exchanges of A (n, n) in place, panel by panel, so that ctrl-C is seen. Returns LAPACK's pivots (n,).
Tensor lu_by_panels(const Tensor& A, InterruptCheck& interrupt) {
  constexpr int64_t kPanel = 256;
  const int64_t n = A.size(0);
  std::vector<Tensor> pivots;
  for (int64_t j = 0; j < n; j += kPanel) {
    interrupt();
    const int64_t w = std::min(kPanel, n - j), rest = n - j - w;
    const Tensor below = A.narrow(0, j, n - j), panel = below.narrow(1, j, w);
    const auto [LU, exchanges, info] = at::linalg_lu_factor_ex(panel);
    const auto [to, from] = moves(exchanges, n - j);
    below.index_copy_(0, to, below.index_select(0, from));
    panel.copy_(LU);
    if (rest > 0) {
      const Tensor right = below.narrow(1, j + w, rest), top = right.narrow(0, 0, w);  // U₁₂ ← L₁₁⁻¹ A₁₂
      top.copy_(at::linalg_solve_triangular(panel.narrow(0, 0, w), top, /*upper=*/false, /*left=*/true,
                                            /*unitriangular=*/true));
      right.narrow(0, w, rest).addmm_(panel.narrow(0, w, rest), top, 1, -1);  // A₂₂ ← A₂₂ − L₂₁ U₁₂
    }
    pivots.push_back(exchanges + j);
  }
  return at::cat(pivots);
}

struct BorderMap final : LinearMap {
  // rows (G·b,): place of each border unknown in a vector; K (G, b, b) contiguous, is overwritten.
  BorderMap(LinearMapPtr M, LinearMapPtr A, const Tensor& rows, const Tensor& K)
      : M_(std::move(M)), A_(std::move(A)), rows_(rows), LU_(K.mT()) {
    const at::NoGradGuard no_grad;
    if (K.size(1) <= kAtOnce) {
      std::tie(LU_, pivots_, std::ignore) = at::linalg_lu_factor_ex(LU_);
      return;
    }
    InterruptCheck interrupt;
    std::vector<Tensor> pivots;  // K may be as large as memory allows: in place
    for (int64_t g = 0; g < K.size(0); ++g) pivots.push_back(lu_by_panels(LU_[g], interrupt));
    pivots_ = at::stack(pivots);
  }

  // A zero pivot makes an Inf or NaN.
  bool finite() const {
    const Tensor diagonal = LU_.diagonal(0, -2, -1);
    return (at::isfinite(LU_.sum()) & diagonal.ne(0).all()).item<bool>();
  }

  Tensor apply(const Tensor& b) const override {
    const at::NoGradGuard no_grad;
    const Tensor given = b.to(LU_.scalar_type()), t = M_->apply(given);
    const Tensor w = solve((A_->apply(t) - given).index_select(1, rows_), false);
    return (t - M_->apply(at::zeros_like(t).index_copy_(1, rows_, w))).to(b.scalar_type());
  }

  Tensor apply_adjoint(const Tensor& b) const override {
    const at::NoGradGuard no_grad;
    const Tensor t = M_->apply_adjoint(b.to(LU_.scalar_type()));
    const Tensor u = at::zeros_like(t).index_copy_(1, rows_, solve(t.index_select(1, rows_), true));
    return (t - M_->apply_adjoint(A_->apply_adjoint(u)) + u).to(b.scalar_type());
  }

 private:
  static constexpr int64_t kAtOnce = 1024;

  // K w = r, or Kᵀ w = r, for rows r (B, G·b): w Kᵀ = r group by group.
  Tensor solve(const Tensor& r, bool transposed) const {
    const int64_t B = r.size(0), G = LU_.size(0), b = LU_.size(1);
    const Tensor grouped = r.reshape({B, G, b}).transpose(0, 1);
    const Tensor w = at::linalg_lu_solve(LU_, pivots_, grouped, /*left=*/false, /*adjoint=*/transposed);
    return w.transpose(0, 1).reshape({B, G * b});
  }

  LinearMapPtr M_, A_;
  Tensor rows_, LU_, pivots_;  // LU factors of Kᵀ
};

}  // namespace

void bind_border(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<BorderMap, LinearMap, std::shared_ptr<BorderMap>>(m, "BorderMap")
      .def(py::init<LinearMapPtr, LinearMapPtr, const Tensor&, const Tensor&>(), py::arg("M"), py::arg("A"),
           py::arg("rows"), py::arg("K"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("finite", &BorderMap::finite);
}

}  // namespace convbn
