// The small problems of arnoldi.h on the CPU, system after system.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "../arnoldi.h"

namespace convbn {
namespace {

using complex_t = c10::complex<double>;

SmallProblem problem(const at::Tensor& small, int64_t s, int64_t restart) {
  return SmallProblem::in(small.mutable_data_ptr<double>() + s * small.stride(0), restart);
}

void rotate_cpu(const at::Tensor& small, const at::Tensor& H, const at::Tensor& limits, int64_t restart, double eps) {
  const int64_t k = H.size(1) - 2;
  std::vector<double> h(k);
  for (int64_t s = 0; s < small.size(0); ++s) {
    const SmallProblem mine = problem(small, s, restart);
    if (k == 1) mine.begin();
    if (!mine.open()) continue;
    const complex_t* column = H.const_data_ptr<complex_t>() + s * H.stride(0);
    for (int64_t i = 0; i < k; ++i) h[i] = column[i].real();
    const double* limit = limits.const_data_ptr<double>() + 2 * s;
    mine.append(h.data(), column[k].real(), column[k + 1].real(), eps, limit[0], limit[1]);
  }
}

at::Tensor solve_cpu(const at::Tensor& small, int64_t restart, int64_t K) {
  const at::Tensor y = at::zeros({small.size(0), K}, small.options().dtype(at::kComplexDouble));
  for (int64_t s = 0; s < small.size(0); ++s) {
    const SmallProblem mine = problem(small, s, restart);
    complex_t* out = y.mutable_data_ptr<complex_t>() + s * K;
    for (int j = 0; j < mine.steps(); ++j) out[j] = mine.g[j];
    for (int j = mine.steps() - 1; j >= 0; --j) {
      const double* column = mine.R + int64_t{j} * (j + 1) / 2;
      out[j] /= column[j];
      for (int i = 0; i < j; ++i) out[i] -= column[i] * out[j];
    }
  }
  return y;
}

}  // namespace
}  // namespace convbn

TORCH_LIBRARY_IMPL(convbn_ext, CPU, m) {
  m.impl("krylov_rotate", &convbn::rotate_cpu);
  m.impl("krylov_solve", &convbn::solve_cpu);
}
