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
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "linear_map.h"
#include "panel_lu.h"

namespace convbn {

using at::Tensor;

namespace {

using LinearMapPtr = std::shared_ptr<LinearMap>;

struct BorderMap final : LinearMap {
  // rows (G·b,): place of each border unknown in a vector; K (G, b, b) contiguous, is overwritten.
  BorderMap(LinearMapPtr M, LinearMapPtr A, const Tensor& rows, const Tensor& K)
      : M_(std::move(M)), A_(std::move(A)), rows_(rows), LU_(K.mT()) {
    const c10::NoGradGuard no_grad;
    if (K.size(0) * K.size(1) * K.size(1) <= kAtOnce * kAtOnce) {
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
    const c10::NoGradGuard no_grad;
    const Tensor given = b.to(LU_.scalar_type()), t = M_->apply(given);
    const Tensor w = solve((A_->apply(t) - given).index_select(1, rows_), false);
    return (t - M_->apply(at::zeros_like(t).index_copy_(1, rows_, w))).to(b.scalar_type());
  }

  Tensor apply_adjoint(const Tensor& b) const override {
    const c10::NoGradGuard no_grad;
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
