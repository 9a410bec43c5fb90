// Block GMRES whose cycles run on the device without a look from the host.
//
// Products with the basis are matrix products (twice, CGS2). Within a block, the rows of W become orthonormal one after
// the other, by the verb orthonormalize against the rows before them: a QR factorisation that reveals the rank as it
// goes. The host must not ask how many directions were left, so blocks keep the size that they had at the start of the
// cycle, and a direction that adds nothing becomes a zero row. To keep H of full rank, a zero row i of V_j maps to
// ‖W‖ times the zero row i of V_{j+1}, which no other column touches: it decouples, and its coefficient is zero.
//
// What each step has to tell stays on the device until the end of the cycle; then the host finds the step at which the
// cycle was over, and forgets those behind it.
#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "block.h"
#include "gmres.h"
#include "krylov.h"
#include "lookout.h"
#include "restart_loop.h"

namespace convbn {
namespace {

using at::Tensor;

class DeviceBlockGmres final : public RestartLoop {
 public:
  DeviceBlockGmres(const LinearMap& A, const Tensor& b, const LinearMap* M, const GmresOptions& options)
      : RestartLoop(A, b, M, options) {
    TORCH_CHECK_TYPE(b.is_floating_point(), "block_gmres: b must be real on ", b.device(), ", got ", b.dtype());
    TORCH_CHECK_VALUE(!options.flexible && !options.on_step, "block_gmres: flexible and on_step need the host's loop");
    limit_restart(2 * b.size(1) * int64_t(c10::elementSize(dtype_)));  // twice: for directions that became zero
  }

 private:
  Tensor correction() override {
    std::vector<double> beta, targets;
    for (System& s : open_) {
      beta.push_back(s.residual);
      targets.push_back(cycle_target(s) / s.residual);
      s.end = End::restart;
      s.singular = false;
    }
    const Tensor scale = column(beta, r_);
    const Tensor target = at::tensor(targets, at::kDouble).to(b_.device(), dtype_);
    auto [C, V] = block::orthonormal_rows((r_ / scale).to(dtype_), kNoise * eps_);  // R = C V₀
    const int64_t p = V.size(0), most = most_steps(p);
    const Tensor basis = at::empty({(most + 1) * p, V.size(1)}, V.options());
    basis.narrow(0, 0, p).copy_(V);
    Tensor alive = at::ones({p}, V.options()), dimension = alive.sum();
    block::Triangle triangle(C.mT().contiguous());
    std::vector<Tensor> records;  // per step: estimates (S,), directions left, smallest diagonal entry, ‖W‖
    Lookout lookout(b_.device());
    for (bool done = false; int64_t(records.size()) < most && !done;) {
      const int64_t K = int64_t(records.size() + 1) * p;
      const Tensor v = basis.narrow(0, K - p, p), known = basis.narrow(0, 0, K);
      const Tensor w = A_.apply(M_ ? M_->apply(v) : v);
      const Tensor w_norm = w.norm();
      const Tensor H = at::matmul(w, known.mT()), once = at::addmm(w, H, known, 1, -1);
      const Tensor again = at::matmul(once, known.mT()), rest = at::addmm(once, again, known, 1, -1);
      const auto [below, left] = orthonormalize_rows(rest, basis.narrow(0, K, p), kNoise * eps_ * w_norm);
      below.diagonal().add_((1 - alive) * w_norm);
      const Tensor diagonal = triangle.append(at::cat({(H + again).mT(), below.mT()}), p);
      const Tensor estimates = at::linalg_vector_norm(triangle.rest(), 2, at::IntArrayRef{0});
      const Tensor smallest = diagonal.diagonal().abs().min();
      records.push_back(at::cat({estimates, at::stack({left.sum(), smallest, w_norm})}));
      alive = left;
      dimension = dimension + left.sum();
      done =
          lookout.all_done(estimates.gt(target).any() & left.any() & w_norm.isfinite() & dimension.le(result_.restart));
      if (options_.interrupt) options_.interrupt();
    }
    const int64_t steps = records.empty() ? 0 : report(at::stack(records).to(at::kDouble).cpu(), p);
    if (steps == 0) return at::zeros_like(r_);
    const Tensor y = triangle.solve(steps, settle_singular(triangle, steps), kNoise * eps_);
    const Tensor u = at::matmul(y.mT(), basis.narrow(0, 0, steps * p));
    return (M_ ? M_->apply(u) : u).to(b_.scalar_type()) * scale;
  }

  int64_t most_steps(int64_t p) const {
    int64_t most = 2 * ((result_.restart + p - 1) / p);  // report stops at a dimension above restart
    if (options_.maxiter > 0)
      for (const System& s : open_) most = std::min(most, options_.maxiter - s.iterations);
    return most;
  }

  // W (p, n) = below · rows with orthonormal or zero `rows` (p, n); returns `below` (p, p), lower triangular, and 1 or
  // 0 per row. A row of which no more than `negligible` is left beside those before it becomes zero.
  static std::tuple<Tensor, Tensor> orthonormalize_rows(const Tensor& W, const Tensor& rows, const Tensor& negligible) {
    const int64_t p = W.size(0);
    const Tensor below = at::zeros({p, p}, W.options()), kept = at::empty({p}, W.options());
    const Tensor slot = at::zeros({1}, W.options().dtype(at::kLong)), vectors = rows.unsqueeze(1);
    for (int64_t i = 0; i < p; ++i) {
      const Tensor h = at::real(krylov::orthonormalize({vectors}, slot, i, W.narrow(0, i, 1)));
      below.narrow(0, i, 1).narrow(1, 0, i + 1).copy_(h.narrow(1, 0, i + 1));
      kept.narrow(0, i, 1).copy_(below.select(0, i).narrow(0, i, 1).gt(negligible));
      rows.narrow(0, i, 1).mul_(kept.narrow(0, i, 1));
    }
    below.diagonal().mul_(kept);
    return {below, kept};
  }

  // What the steps say goes into the systems, up to the one that ended the cycle; returns how many those are.
  int64_t report(const Tensor& records, int64_t p) {
    const auto S = int64_t(open_.size());
    auto dimension = double(p);
    for (int64_t j = 0; j < records.size(0); ++j) {
      const double* record = records.const_data_ptr<double>() + j * records.size(1);
      const double left = record[S], smallest = record[S + 1], w_norm = record[S + 2];
      if (!std::isfinite(w_norm)) {
        for (System& s : open_) s.end = End::nonfinite;
        return j;
      }
      if (share_step(record, left > 0, smallest, w_norm)) return j + 1;
      dimension += left;
      if (dimension > double(result_.restart)) return j + 1;
    }
    return records.size(0);
  }
};

}  // namespace

GmresResult device_block_gmres(const LinearMap& A, const Tensor& b, const std::optional<Tensor>& x0, const LinearMap* M,
                               const GmresOptions& options) {
  return DeviceBlockGmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
