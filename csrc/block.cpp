#include "block.h"

#include <ATen/ATen.h>

#include <cmath>

namespace convbn::block {

using at::Tensor;

std::tuple<Tensor, Tensor> orthonormal_rows(const Tensor& W, double negligible) {
  const auto [Q, R] = at::linalg_qr(W.mH());                               // Wᴴ = Q R
  const auto [U, sigma, Wh] = at::linalg_svd(R, /*full_matrices=*/false);  // R = U Σ Wh
  const int64_t q = sigma.gt(negligible).sum().item<int64_t>();
  const Tensor V = at::matmul(U.narrow(1, 0, q).mH(), Q.mH());
  return {(sigma.narrow(0, 0, q).unsqueeze(1) * Wh.narrow(0, 0, q)).mH().contiguous(), V};
}

Tensor Triangle::append(Tensor h, int64_t q) {
  const int64_t p = h.size(1), K = h.size(0) - q;
  for (size_t i = 0; i < rotations_.size(); ++i) {
    Tensor rows = h.narrow(0, offsets_[i], rotations_[i].size(0));
    rows.copy_(at::matmul(rotations_[i], rows));
  }
  const auto [Q, triangle] = at::linalg_qr(h.narrow(0, K - p, p + q), "complete");
  rotations_.push_back(Q.mH());
  offsets_.push_back(K - p);
  R_.push_back(at::cat({h.narrow(0, 0, K - p), triangle.narrow(0, 0, p)}));
  G_ = at::cat({G_, at::zeros({q, G_.size(1)}, G_.options())});
  G_.narrow(0, K - p, p + q).copy_(at::matmul(rotations_.back(), G_.narrow(0, K - p, p + q)));
  columns_ = K;
  return triangle;
}

Tensor Triangle::whole(int64_t steps) const {
  int64_t K = 0;
  for (int64_t j = 0; j < steps; ++j) K += R_[j].size(1);
  const Tensor triangle = at::zeros({K, K}, G_.options());
  int64_t column = 0;
  for (int64_t j = 0; j < steps; ++j) {
    triangle.narrow(1, column, R_[j].size(1)).narrow(0, 0, R_[j].size(0)).copy_(R_[j]);
    column += R_[j].size(1);
  }
  return triangle;
}

// A diagonal of like entries is taken for that of a regular R, which spares most cycles the singular values.
bool Triangle::singular(int64_t steps, double cutoff) const {
  const Tensor triangle = whole(steps), diagonal = triangle.diagonal().abs();
  if (diagonal.numel() == 0) return false;
  if (diagonal.min().item<double>() > std::sqrt(cutoff) * diagonal.max().item<double>()) return false;
  const Tensor sigma = at::linalg_svdvals(triangle);
  return sigma.min().item<double>() <= cutoff * double(triangle.size(0)) * sigma.max().item<double>();
}

Tensor Triangle::solve(int64_t steps, bool singular, double cutoff) const {
  const Tensor triangle = whole(steps), g = G_.narrow(0, 0, triangle.size(0));
  return singular ? at::matmul(at::linalg_pinv(triangle, cutoff * double(triangle.size(0))), g)
                  : at::linalg_solve_triangular(triangle, g, /*upper=*/true);
}

Tensor Triangle::residual() const {
  Tensor rest = G_.clone();
  rest.narrow(0, 0, columns_).zero_();
  for (size_t i = rotations_.size(); i-- > 0;) {
    Tensor rows = rest.narrow(0, offsets_[i], rotations_[i].size(0));
    rows.copy_(at::matmul(rotations_[i].mH(), rows));
  }
  return rest;
}

}  // namespace convbn::block
