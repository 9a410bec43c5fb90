// Least squares with the Hessenberg matrix of an Arnoldi process on the host, see arnoldi.h. Complex double throughout;
// a real system has zero imaginary parts, and rotating those costs nothing beside the basis.
#pragma once
#include <complex>
#include <cstdint>
#include <vector>

#include "arnoldi.h"

namespace convbn {

class HessenbergQR {
 public:
  using scalar = std::complex<double>;

  // Appends the column h(0..j) with h_next = H(j+1, j) ≥ 0 below it; returns |g(j+1)|. See eliminate for `negligible`.
  template <class Column>
  double append(const Column* h, double h_next, double negligible = 0) {
    const auto j = size();
    std::vector<scalar> r(h, h + j + 1);
    for (int64_t i = 0; i < j; ++i) rotations_[i].apply(r[i], r[i + 1]);
    rotations_.push_back(eliminate(r[j], h_next, negligible, singular_));
    g_.emplace_back(0);
    rotations_[j].apply(g_[j], g_[j + 1]);
    R_.push_back(std::move(r));
    return std::abs(g_.back());
  }

  int64_t size() const { return int64_t(R_.size()); }

  // The last column depended on the others.
  bool singular() const { return singular_; }

  // The minimiser: R y = g(0 … k−1) after k columns.
  std::vector<scalar> solve() const {
    std::vector<scalar> y(g_.begin(), g_.end() - 1);
    for (int64_t j = size() - 1; j >= 0; --j) {
      y[j] /= R_[j][j];
      for (int64_t i = 0; i < j; ++i) y[i] -= R_[j][i] * y[j];
    }
    return y;
  }

  // Coefficients in v₀ … v_k of the residual after k columns: g(k) Q e_k.
  std::vector<scalar> residual() const {
    std::vector<scalar> c(g_.size());
    c.back() = g_.back();
    for (int64_t i = size() - 1; i >= 0; --i)  // the adjoint of each rotation, last one first
      Rotation<scalar>{rotations_[i].cs, -rotations_[i].sn}.apply(c[i], c[i + 1]);
    return c;
  }

 private:
  std::vector<std::vector<scalar>> R_;  // columns
  std::vector<Rotation<scalar>> rotations_;
  std::vector<scalar> g_ = {1};
  bool singular_ = false;
};

}  // namespace convbn
