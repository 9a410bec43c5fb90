// Block GMRES: all systems share A, and each step multiplies by A a whole block of vectors, one per residual direction.
//
//   R = C V₀ (rows are residuals in units of their norms, V₀ orthonormal rows), A M V_j = Σ_i H_ij V_i: every system
//   minimises over the space that all of them built, so it needs about ⌈rank(A M − I)/B⌉ + 1 block steps where single
//   GMRES needs rank.
//
// Directions that add nothing (relative to rounding) are deflated: a block is V = Uᴴ Qᵀ from a QR factorisation and the
// SVD of its small factor. H is kept triangular by one small orthogonal matrix per step (a block of Givens rotations).
// Vital (1990); Gutknecht (2007) for deflation.
#include <ATen/ATen.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "gmres.h"
#include "restart_loop.h"

namespace convbn {
namespace {

using at::Tensor;

// Rows of W (p, n) as W = C V with orthonormal rows V (q, n), q ≤ p: singular values up to `negligible` are dropped.
std::tuple<Tensor, Tensor> orthonormal_rows(const Tensor& W, double negligible) {
  const auto [Q, R] = at::linalg_qr(W.mH());                               // Wᴴ = Q R
  const auto [U, sigma, Wh] = at::linalg_svd(R, /*full_matrices=*/false);  // R = U Σ Wh
  const int64_t q = sigma.gt(negligible).sum().item<int64_t>();
  const Tensor V = at::matmul(U.narrow(1, 0, q).mH(), Q.mH());
  return {(sigma.narrow(0, 0, q).unsqueeze(1) * Wh.narrow(0, 0, q)).mH().contiguous(), V};
}

class BlockGmres final : public RestartLoop {
 public:
  BlockGmres(const LinearMap& A, const Tensor& b, const LinearMap* M, const GmresOptions& options)
      : RestartLoop(A, b, M, options) {
    limit_restart(b.size(1) * int64_t(c10::elementSize(dtype_)) * (options.flexible ? 2 : 1));
  }

 private:
  Tensor correction() override {
    const auto S = int64_t(open_.size());
    std::vector<double> beta(S);
    for (int64_t s = 0; s < S; ++s) {
      beta[s] = open_[s].residual;
      open_[s].end = End::restart;
      open_[s].singular = false;
    }
    const Tensor scale = column(beta, r_);
    auto [C, V] = orthonormal_rows((r_ / scale).to(dtype_), kNoise * eps_);  // R = C V₀
    Tensor basis = V, Z;                                                     // all blocks (K, n)
    Tensor G = C.mT().contiguous();  // coefficients of R in the basis, rotated (K, S)
    std::vector<Tensor> rotations, R;
    std::vector<int64_t> offsets;
    for (int64_t j = 0; basis.size(0) <= result_.restart; ++j) {
      const int64_t p = V.size(0), K = basis.size(0);
      const Tensor z = M_ ? M_->apply(V) : V;
      if (options_.flexible) Z = Z.defined() ? at::cat({Z, z}) : z;
      Tensor W = A_.apply(z);  // W ← A M V_j
      const double w_norm = W.norm().item<double>();
      if (!std::isfinite(w_norm)) {
        for (System& s : open_) s.end = End::nonfinite;
        break;
      }
      Tensor H = at::matmul(W, basis.mH());  // (p, K), twice (CGS2)
      W = W - at::matmul(H, basis);
      const Tensor again = at::matmul(W, basis.mH());
      W = W - at::matmul(again, basis);
      auto [below, next] = orthonormal_rows(W, kNoise * eps_ * w_norm);  // W = below · next
      const int64_t q = next.size(0);
      Tensor h = at::cat({(H + again).mT(), below.mT()});  // column block of H: (K + q, p)
      for (size_t i = 0; i < rotations.size(); ++i) {
        Tensor rows = h.narrow(0, offsets[i], rotations[i].size(0));
        rows.copy_(at::matmul(rotations[i], rows));
      }
      const auto [Q, triangle] = at::linalg_qr(h.narrow(0, K - p, p + q), "complete");
      rotations.push_back(Q.mH());
      offsets.push_back(K - p);
      R.push_back(at::cat({h.narrow(0, 0, K - p), triangle.narrow(0, 0, p)}));  // (K, p)
      G = at::cat({G, at::zeros({q, S}, G.options())});
      G.narrow(0, K - p, p + q).copy_(at::matmul(rotations.back(), G.narrow(0, K - p, p + q)));
      const bool done = record(G.narrow(0, K, q), triangle, q, w_norm);
      if (options_.on_step)
        options_.on_step([&] { return estimates(); },
                         [&] { return residual_vectors(rotations, offsets, G, K, at::cat({basis, next}), scale); });
      if (done) break;
      basis = at::cat({basis, next});
      V = next;
    }
    return expand(R, G, basis, Z).to(b_.scalar_type()) * scale;
  }

  // Residual norms of this step (the rows of G below R); whether the cycle ends here.
  bool record(const Tensor& rest, const Tensor& triangle, int64_t q, double w_norm) {
    const Tensor norms = at::linalg_vector_norm(rest, 2, at::IntArrayRef{0}).to(at::kDouble).cpu();
    const double smallest = triangle.diagonal().abs().min().item<double>();
    bool all = true, limit = false;
    for (size_t s = 0; s < open_.size(); ++s) {
      System& system = open_[s];
      const double estimate = system.residual * norms[int64_t(s)].item<double>();
      system.history.push_back(estimate);
      limit |= ++system.iterations == options_.maxiter;
      system.singular |= smallest <= kNoise * eps_ * w_norm;
      all &= estimate <= cycle_target(system);
    }
    const End end = q == 0 ? End::exhausted : all ? End::claimed : limit ? End::maxiter : End::restart;
    for (System& system : open_) system.end = end;
    return end != End::restart;
  }

  // b − A x (B, n) of the open systems: what R leaves of G, turned back into the basis; zero for the others.
  Tensor residual_vectors(const std::vector<Tensor>& rotations, const std::vector<int64_t>& offsets, const Tensor& G,
                          int64_t K, const Tensor& basis, const Tensor& scale) const {
    Tensor rest = G.clone();
    rest.narrow(0, 0, K).zero_();
    for (size_t i = rotations.size(); i-- > 0;) {
      Tensor rows = rest.narrow(0, offsets[i], rotations[i].size(0));
      rows.copy_(at::matmul(rotations[i].mH(), rows));
    }
    return at::zeros_like(b_).index_copy_(0, open_rows(), at::matmul(rest.mT(), basis).to(b_.scalar_type()) * scale);
  }

  // M V y with R y = G, or Z y; directions on which R is singular are left out.
  Tensor expand(const std::vector<Tensor>& R, const Tensor& G, const Tensor& basis, const Tensor& Z) const {
    int64_t K = 0;
    for (const Tensor& block : R) K += block.size(1);
    if (K == 0) return at::zeros_like(r_).to(dtype_);
    Tensor triangle = at::zeros({K, K}, G.options());
    int64_t at_column = 0;
    for (const Tensor& block : R) {
      triangle.narrow(1, at_column, block.size(1)).narrow(0, 0, block.size(0)).copy_(block);
      at_column += block.size(1);
    }
    const bool singular = open_.front().singular;
    const Tensor y = singular ? at::matmul(at::linalg_pinv(triangle, kNoise * eps_ * K), G.narrow(0, 0, K))
                              : at::linalg_solve_triangular(triangle, G.narrow(0, 0, K), /*upper=*/true);
    const Tensor u = at::matmul(y.mT(), (Z.defined() ? Z : basis).narrow(0, 0, K));
    return M_ && !Z.defined() ? M_->apply(u) : u;
  }
};

}  // namespace

GmresResult block_gmres(const LinearMap& A, const Tensor& b, const std::optional<Tensor>& x0, const LinearMap* M,
                        const GmresOptions& options) {
  return BlockGmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
