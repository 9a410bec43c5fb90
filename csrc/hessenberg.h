// Least squares with the Hessenberg matrix of an Arnoldi process, one column and one Givens rotation a step:
//
//   min_y ‖e₁ − H y‖,   H = Q [R; 0],   g = Qᴴ e₁,   |g(j+1)| = the minimum after j + 1 columns (in units of β = ‖r₀‖).
//
// Complex double throughout; a real system has zero imaginary parts, and rotating those costs nothing beside the basis.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace convbn {

class HessenbergQR {
 public:
  using scalar = std::complex<double>;

  // Appends the column h(0..j) with h_next = H(j+1, j) ≥ 0 below it; returns |g(j+1)|. A column of which no more than
  // `negligible` is left beside the others adds nothing: its coefficient in y becomes zero (and `singular` true).
  template <class Column>
  double append(const Column* h, double h_next, double negligible = 0) {
    const auto j = size();
    std::vector<scalar> r(h, h + j + 1);
    for (int64_t i = 0; i < j; ++i) {
      const scalar a = r[i], b = r[i + 1];
      r[i] = cs_[i] * a + sn_[i] * b;
      r[i + 1] = cs_[i] * b - std::conj(sn_[i]) * a;
    }
    // [cs, sn; −conj(sn), cs] takes (r_j, h_next) to (phase·length, 0).
    const double size_of_r = std::abs(r[j]), length = std::hypot(size_of_r, h_next);
    const scalar phase = size_of_r > 0 ? r[j] / size_of_r : scalar(1);
    singular_ = length <= negligible;
    cs_.push_back(singular_ ? 0 : size_of_r / length);
    sn_.push_back(singular_ ? scalar(1) : phase * (h_next / length));
    r[j] = singular_ ? scalar(1) : phase * length;
    g_.push_back(-std::conj(sn_[j]) * g_[j]);
    g_[j] *= cs_[j];
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
    for (int64_t i = size() - 1; i >= 0; --i) {  // the adjoint of each rotation, last one first
      const scalar a = c[i], b = c[i + 1];
      c[i] = cs_[i] * a - sn_[i] * b;
      c[i + 1] = cs_[i] * b + std::conj(sn_[i]) * a;
    }
    return c;
  }

 private:
  std::vector<std::vector<scalar>> R_;  // columns
  std::vector<double> cs_;
  std::vector<scalar> sn_, g_ = {1};
  bool singular_ = false;
};

}  // namespace convbn
