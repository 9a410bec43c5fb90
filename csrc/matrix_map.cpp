// Explicit matrices as linear maps: DenseMap (m, n), and CsrMap with one dot product per row, row by row, so that the
// result depends neither on the batch nor on the number of threads.
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

#include "linear_map.h"

namespace convbn {
namespace {

using at::Tensor;

struct DenseMap final : LinearMap {
  explicit DenseMap(const Tensor& matrix) : matrix_(matrix.detach()) {
    TORCH_CHECK_VALUE(matrix.dim() == 2, "DenseMap: matrix must have shape (m, n), got ", matrix.sizes());
  }
  Tensor apply(const Tensor& v) const override { return at::mm(v, matrix_.to(v.scalar_type()).t()); }
  Tensor apply_adjoint(const Tensor& u) const override { return at::mm(u, matrix_.to(u.scalar_type()).conj()); }
  Tensor matrix_;
};

// row_start (m + 1,) int64, column (nnz,) int32, value (nnz,).
struct CsrMap final : LinearMap {
  CsrMap(const Tensor& row_start, const Tensor& column, const Tensor& value, int64_t columns)
      : row_start_(row_start.to(at::kLong).contiguous()),
        column_(column.to(at::kInt).contiguous()),
        value_(value.detach().resolve_conj().contiguous()),
        columns_(columns) {
    const bool starts = row_start.dim() == 1 && row_start.numel() > 0 && row_start_[0].item<int64_t>() == 0 &&
                        row_start_[-1].item<int64_t>() == column.numel() && row_start_.diff().ge(0).all().item<bool>();
    TORCH_CHECK_VALUE(starts, "CsrMap: row_start must rise from 0 to the number of entries ", column.numel());
    TORCH_CHECK_VALUE(column.sizes() == value.sizes() && column.dim() == 1,
                      "CsrMap: column and value must have one shape (nnz,), got ", column.sizes(), " and ",
                      value.sizes());
    TORCH_CHECK_VALUE(column.numel() == 0 || (column_.min().item<int>() >= 0 && column_.max().item<int>() < columns),
                      "CsrMap: columns must lie in [0, ", columns, ")");
  }

  Tensor apply(const Tensor& v) const override {
    TORCH_CHECK_VALUE(v.dim() == 2 && v.size(1) == columns_, "CsrMap: v must have shape (B, ", columns_, "), got ",
                      v.sizes());
    const Tensor x = v.resolve_conj().contiguous(), values = value_.to(v.scalar_type());
    const int64_t B = v.size(0), m = row_start_.numel() - 1;
    Tensor result = at::empty({B, m}, v.options());
    AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES(v.scalar_type(), "CsrMap", [&] {
      const auto* start = row_start_.const_data_ptr<int64_t>();
      const auto* column = column_.const_data_ptr<int>();
      const auto* value = values.const_data_ptr<scalar_t>();
      const auto* in = x.const_data_ptr<scalar_t>();
      auto* out = result.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, B * m, kRowsPerTask, [&](int64_t begin, int64_t end) {
        const scalar_t* row = in + begin / m * columns_;
        for (int64_t i = begin, r = begin % m; i < end; ++i, ++r) {
          if (r == m) r = 0, row += columns_;
          scalar_t sums[4] = {};  // no sum waits for the one before it
          int64_t e = start[r];
          for (; e + 4 <= start[r + 1]; e += 4)
            for (int l = 0; l < 4; ++l) sums[l] += value[e + l] * row[column[e + l]];
          for (; e < start[r + 1]; ++e) sums[0] += value[e] * row[column[e]];
          out[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
      });
    });
    return result;
  }

  Tensor apply_adjoint(const Tensor& u) const override {
    const int64_t B = u.size(0), m = row_start_.numel() - 1;
    TORCH_CHECK_VALUE(u.dim() == 2 && u.size(1) == m, "CsrMap: u must have shape (B, ", m, "), got ", u.sizes());
    const Tensor x = u.resolve_conj().contiguous(), values = value_.to(u.scalar_type()).conj().resolve_conj();
    Tensor result = at::zeros({B, columns_}, u.options());
    AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES(u.scalar_type(), "CsrMap", [&] {
      const auto* start = row_start_.const_data_ptr<int64_t>();
      const auto* column = column_.const_data_ptr<int>();
      const auto* value = values.const_data_ptr<scalar_t>();
      at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const scalar_t* in = x.const_data_ptr<scalar_t>() + s * m;
          scalar_t* out = result.mutable_data_ptr<scalar_t>() + s * columns_;
          for (int64_t i = 0; i < m; ++i)
            for (int64_t e = start[i]; e < start[i + 1]; ++e) out[column[e]] += value[e] * in[i];
        }
      });
    });
    return result;
  }

  static constexpr int64_t kRowsPerTask = 512;
  Tensor row_start_, column_, value_;
  int64_t columns_;
};

}  // namespace

void bind_matrix_maps(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<DenseMap, LinearMap, std::shared_ptr<DenseMap>>(m, "DenseMap")
      .def(py::init<const Tensor&>(), py::arg("matrix"));
  py::class_<CsrMap, LinearMap, std::shared_ptr<CsrMap>>(m, "CsrMap")
      .def(py::init<const Tensor&, const Tensor&, const Tensor&, int64_t>(), py::arg("row_start"), py::arg("column"),
           py::arg("value"), py::arg("columns"));
}

}  // namespace convbn
