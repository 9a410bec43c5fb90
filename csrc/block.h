// What block GMRES does with small matrices, for the host's loop (block_gmres.cpp) and the device's
// (device_block_gmres.cpp).
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

namespace convbn::block {

// Rows of W (p, n) as W = C V with orthonormal rows V (q, n), q ≤ p: singular values up to `negligible` are dropped.
std::tuple<at::Tensor, at::Tensor> orthonormal_rows(const at::Tensor& W, double negligible);

// H kept triangular, one block column and one small orthogonal matrix a step, and the right-hand sides with it.
class Triangle {
 public:
  // G (K, S): coefficients of the right-hand sides in the first block.
  explicit Triangle(at::Tensor G) : G_(std::move(G)) {}

  // Block column h (K + q, p) of H; returns the triangle on its diagonal (p + q, p). K, p, q: rows above, columns, new
  // rows.
  at::Tensor append(at::Tensor h, int64_t q);

  // What is left of the right-hand sides below the triangle (q, S).
  at::Tensor rest() const { return G_.narrow(0, columns_, G_.size(0) - columns_); }
  int64_t columns() const { return columns_; }

  // Whether R, of the first `steps` blocks, is singular: its least singular value is at most K·cutoff of its largest.
  bool singular(int64_t steps, double cutoff) const;

  // y (columns, S) of R y = G for the first `steps` blocks; with a singular R by its pseudo-inverse.
  at::Tensor solve(int64_t steps, bool singular, double cutoff) const;

  // Coefficients (K + q, S) of the residuals in the basis.
  at::Tensor residual() const;

 private:
  at::Tensor whole(int64_t steps) const;  // R (K, K)

  at::Tensor G_;
  std::vector<at::Tensor> rotations_, R_;  // R_: block columns (K, p)
  std::vector<int64_t> offsets_;
  int64_t columns_ = 0;
};

}  // namespace convbn::block
