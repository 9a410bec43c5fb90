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

#include "block.h"
#include "gmres.h"
#include "restart_loop.h"

namespace convbn {
namespace {

using at::Tensor;

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
    auto [C, V] = block::orthonormal_rows((r_ / scale).to(dtype_), kNoise * eps_);  // R = C V₀
    Tensor basis = V, Z;                                                            // all blocks (K, n)
    block::Triangle triangle(C.mT().contiguous());                                  // coefficients of R in the basis
    int64_t steps = 0;
    for (int64_t j = 0; basis.size(0) <= result_.restart; ++j) {
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
      auto [below, next] = block::orthonormal_rows(W, kNoise * eps_ * w_norm);  // W = below · next
      const int64_t q = next.size(0);
      const Tensor diagonal = triangle.append(at::cat({(H + again).mT(), below.mT()}), q);  // column block of H
      ++steps;
      const Tensor norms = at::linalg_vector_norm(triangle.rest(), 2, at::IntArrayRef{0}).to(at::kDouble).cpu();
      const double smallest = diagonal.diagonal().abs().min().item<double>();
      const bool done = share_step(norms.const_data_ptr<double>(), q > 0, smallest, w_norm);
      if (options_.interrupt) options_.interrupt();
      if (options_.on_step)
        options_.on_step([&] { return estimates(); },
                         [&] { return residual_vectors(triangle.residual(), at::cat({basis, next}), scale); });
      if (done) break;
      basis = at::cat({basis, next});
      V = next;
    }
    return expand(triangle, steps, Z.defined() ? Z : basis).to(b_.scalar_type()) * scale;
  }

  // b − A x (B, n) of the open systems from its coefficients in the basis; zero for the others.
  Tensor residual_vectors(const Tensor& c, const Tensor& basis, const Tensor& scale) const {
    return at::zeros_like(b_).index_copy_(0, open_rows(), at::matmul(c.mT(), basis).to(b_.scalar_type()) * scale);
  }

  // M V y, or Z y; directions on which R is singular are left out.
  Tensor expand(const block::Triangle& triangle, int64_t steps, const Tensor& basis) {
    if (steps == 0) return at::zeros_like(r_).to(dtype_);
    const Tensor y = triangle.solve(steps, settle_singular(triangle, steps), kNoise * eps_);
    const Tensor u = at::matmul(y.mT(), basis.narrow(0, 0, y.size(0)));
    return M_ && !options_.flexible ? M_->apply(u) : u;
  }
};

}  // namespace

GmresResult block_gmres(const LinearMap& A, const Tensor& b, const std::optional<Tensor>& x0, const LinearMap* M,
                        const GmresOptions& options) {
  return BlockGmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
