#include "panel_lu.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace convbn {

using at::Tensor;

namespace {

constexpr int64_t kAtOnce = 1024;  // a matrix of this order takes less than half a second

// Columns whose work, 2n² flop each, takes a fraction of a second; wide enough for matrix products.
int64_t panel_width(int64_t n) { return std::clamp<int64_t>((int64_t{1} << 32) / (n * n), 96, 512); }

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

}  // namespace

Tensor lu_by_panels(const Tensor& A, InterruptCheck& interrupt) {
  const int64_t n = A.size(0), width = panel_width(n);
  std::vector<Tensor> pivots;
  for (int64_t j = 0; j < n; j += width) {
    if (!interrupt()) break;
    const int64_t w = std::min(width, n - j), rest = n - j - w;
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
  return pivots.empty() ? Tensor() : at::cat(pivots);
}

void invert_by_panels(const Tensor& A, InterruptCheck& interrupt) {
  const int64_t n = A.size(0), width = panel_width(n);
  if (n <= kAtOnce) return void(A.copy_(std::get<0>(at::linalg_inv_ex(A))));
  const Tensor LU = A.clone().mT(), pivots = lu_by_panels(LU, interrupt);  // of Aᵀ: columns are contiguous for LAPACK
  for (int64_t j = 0; j < n; j += width) {
    if (!interrupt()) return;
    const int64_t w = std::min(width, n - j);
    const Tensor unit = at::zeros({w, n}, A.options()).mT();
    unit.narrow(0, j, w).fill_diagonal_(1);
    A.narrow(0, j, w).copy_(at::linalg_lu_solve(LU, pivots, unit).mT());  // rows of A⁻¹ are columns of A⁻ᵀ
  }
}

}  // namespace convbn
