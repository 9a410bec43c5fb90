// A⁻¹ of a convolution by block-tridiagonal LU (spec S15), as a linear map.
//
// Along one image axis, groups of rows that are as high as the kernel reaches couple only with their neighbours, so in
// the order (group, everything else) A has blocks L_r, D_r, U_r of m × m, r = 0 … R−1.  A = 𝓛 𝓤 with Schur complements
// S_r on the diagonal:
//   S_r = D_r − L_r E_{r−1},   G_r = S_r⁻¹,   E_r = G_r U_r,   P_r = G_r L_r
//   A x = b:   y = G b in one batched product,  y_r −= P_r y_{r−1} downwards,  x_r = y_r − E_r x_{r+1} upwards
//   Aᵀ x = b:  w_r = b_r − E_{r−1}ᵀ w_{r−1} downwards,  t_r = w_r − P_{r+1}ᵀ t_{r+1} upwards,  x = Gᵀ t in one batched
//   product
// Pivoting happens inside a block only, so this is no backward stable solver: it is a preconditioner, made of matrix
// products throughout. R = 1 is the dense inverse.  Rows that fill the last group up are identity rows.
#include <c10/core/GradMode.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

#include "linear_map.h"
#include "panel_lu.h"

namespace convbn {

using at::Tensor;

namespace {

struct BlockTridiagonalMap final : LinearMap {
  // lower, diagonal, upper (R, m, m) in the dtype of the factor; diagonal and upper are overwritten.
  // shape (C, *spatial) of a vector; axis: which spatial axis the groups run along; rows: of that axis in a group.
  BlockTridiagonalMap(const Tensor& lower, const Tensor& diagonal, const Tensor& upper, std::vector<int64_t> shape,
                      int64_t axis, int64_t rows)
      : inverse_(diagonal),
        upper_(upper),
        lower_(at::empty_like(lower)),
        shape_(std::move(shape)),
        axis_(axis),
        rows_(rows) {
    const c10::NoGradGuard no_grad;
    InterruptCheck interrupt;
    for (int64_t r = 0; r < groups(); ++r) {
      interrupt();
      if (r > 0) inverse_[r].addmm_(lower[r], upper_[r - 1], 1, -1);          // S_r = D_r − L_r E_{r−1}
      invert_by_panels(inverse_[r], interrupt);                               // G_r
      if (r + 1 < groups()) upper_[r].copy_(at::mm(inverse_[r], upper_[r]));  // E_r
      if (r > 0) lower_[r].copy_(at::mm(inverse_[r], lower[r]));              // P_r
    }
  }

  int64_t groups() const { return inverse_.size(0); }

  // A zero pivot block shows as Inf or NaN in its inverse.
  bool finite() const { return at::isfinite(inverse_.sum()).item<bool>(); }

  Tensor apply(const Tensor& b) const override {
    const c10::NoGradGuard no_grad;
    const Tensor y = at::bmm(to_groups(b), inverse_.mT());
    for (int64_t r = 1; r < groups(); ++r) y[r].addmm_(y[r - 1], lower_[r].t(), 1, -1);
    for (int64_t r = groups() - 2; r >= 0; --r) y[r].addmm_(y[r + 1], upper_[r].t(), 1, -1);
    return from_groups(y, b);
  }

  Tensor apply_adjoint(const Tensor& b) const override {
    const c10::NoGradGuard no_grad;
    const Tensor w = to_groups(b);
    for (int64_t r = 1; r < groups(); ++r) w[r].addmm_(w[r - 1], upper_[r - 1], 1, -1);
    for (int64_t r = groups() - 2; r >= 0; --r) w[r].addmm_(w[r + 1], lower_[r + 1], 1, -1);
    return from_groups(at::bmm(w, inverse_), b);
  }

 private:
  // (B, n) → (R, B, m), a fresh tensor in the dtype of the factor; m runs over (row in group, C, other axes).
  Tensor to_groups(const Tensor& v) const {
    std::vector<int64_t> sizes{v.size(0)};
    sizes.insert(sizes.end(), shape_.begin(), shape_.end());
    const Tensor rows = v.to(inverse_.scalar_type()).reshape(sizes).movedim(axis_ + 2, 0).flatten(2);  // (S, B, n/S)
    const int64_t S = rows.size(0), B = v.size(0), per_row = rows.size(2);
    Tensor filled = rows;
    if (S < groups() * rows_) {
      filled = at::zeros({groups() * rows_, B, per_row}, rows.options());
      filled.narrow(0, 0, S).copy_(rows);
    }
    const Tensor grouped = filled.reshape({groups(), rows_, B, per_row}).transpose(1, 2);
    return grouped.clone(at::MemoryFormat::Contiguous).reshape({groups(), B, rows_ * per_row});
  }

  Tensor from_groups(const Tensor& x, const Tensor& like) const {
    const int64_t S = shape_[axis_ + 1], B = like.size(0), per_row = x.size(2) / rows_;
    std::vector<int64_t> sizes{S, B};
    for (size_t i = 0; i < shape_.size(); ++i)
      if (int64_t(i) != axis_ + 1) sizes.push_back(shape_[i]);
    const Tensor rows = x.reshape({groups(), B, rows_, per_row}).transpose(1, 2).flatten(0, 1).narrow(0, 0, S);
    return rows.reshape(sizes).movedim(0, axis_ + 2).reshape(like.sizes()).to(like.scalar_type());
  }

  Tensor inverse_, upper_, lower_;  // G, E, P: (R, m, m)
  std::vector<int64_t> shape_;
  int64_t axis_, rows_;
};

}  // namespace

void bind_block_tridiagonal(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<BlockTridiagonalMap, LinearMap, std::shared_ptr<BlockTridiagonalMap>>(m, "BlockTridiagonalMap")
      .def(py::init<const Tensor&, const Tensor&, const Tensor&, std::vector<int64_t>, int64_t, int64_t>(),
           py::arg("lower"), py::arg("diagonal"), py::arg("upper"), py::arg("shape"), py::arg("axis"), py::arg("rows"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("finite", &BlockTridiagonalMap::finite);
}

}  // namespace convbn
