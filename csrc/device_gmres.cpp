// Single GMRES whose cycles run on the device without a look from the host: rotations, estimates and the reason to stop
// live in the small problems (arnoldi.h), and the host reads them once, at the end of a cycle.
//
//   one launch   where A is a convolution that the backend builds into its kernel and M = I: krylov::cycle
//   many         otherwise: A, M, orthonormalize and rotate per step. A system that is done is computed on with the
//                others, and nothing of it is used; the host stops the cycle when it happens to learn that all are
//                done.
//
// Statuses, true residuals and restarts are those of restart_loop.h.
#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "basis.h"
#include "gmres.h"
#include "krylov.h"
#include "lookout.h"
#include "restart_loop.h"

namespace convbn {
namespace {

using at::Tensor;

// One block of threads per system is worth it while a vector stays small (measured on an H100, cycles of 60 steps: at
// 12 KB 1.5 to 3.8 times as fast as single verbs, at 24 KB 0.9 to 1.6, at 32 KB 0.4 to 0.6), and the small problem of
// 2048 steps still fits into the shared memory of every GPU from sm_80 on.
constexpr int64_t kMostBytesPerBlock = 16 << 10, kMostStepsPerBlock = 2048;

class DeviceGmres final : public RestartLoop {
 public:
  DeviceGmres(const LinearMap& A, const Tensor& b, const LinearMap* M, const GmresOptions& options)
      : RestartLoop(A, b, M, options) {
    TORCH_CHECK_TYPE(b.is_floating_point(), "gmres: b must be real on ", b.device(), ", got ", b.dtype());
    TORCH_CHECK_VALUE(!options.flexible && !options.on_step, "gmres: flexible and on_step need the host's loop");
    const int64_t B = b.size(0), n = b.size(1);
    limit_restart(B * n * int64_t(c10::elementSize(dtype_) + 4));  // the triangle of n steps: 4 n per step
    const bool small =
        n * int64_t(c10::elementSize(dtype_)) <= kMostBytesPerBlock && result_.restart <= kMostStepsPerBlock;
    if (!M && small && krylov::has_cycle(b)) convolution_ = A.convolution();
    if (convolution_) {
      convolution_->weight = convolution_->weight.to(dtype_).contiguous();
      if (convolution_->row_scale) convolution_->row_scale = convolution_->row_scale->to(dtype_).contiguous();
    } else {
      V_ = std::make_unique<Basis>(result_.restart + 1, B, n, b.options().dtype(dtype_));
    }
  }

 private:
  Tensor correction() override {
    std::vector<double> beta, limits;
    for (const System& s : open_) {
      beta.push_back(s.residual);
      limits.push_back(cycle_target(s) / s.residual);
      limits.push_back(options_.maxiter > 0 ? double(options_.maxiter - s.iterations)
                                            : std::numeric_limits<double>::infinity());
    }
    const Tensor scale = column(beta, r_), r = (r_ / scale).to(dtype_);
    const Tensor bounds = at::tensor(limits, at::kDouble).view({-1, 2}).to(b_.device());
    const auto [u, small] =
        convolution_ ? krylov::cycle(r, bounds, result_.restart, eps_, *convolution_) : steps(r, bounds);
    if (options_.interrupt) options_.interrupt();
    report(small.narrow(1, 0, SmallProblem::record_size(result_.restart)).cpu());
    return (M_ ? M_->apply(u) : u).to(b_.scalar_type()) * scale;
  }

  // V y (S, n) and the small problems after a cycle of single verbs.
  std::tuple<Tensor, Tensor> steps(const Tensor& r, const Tensor& limits) {
    const int64_t S = r.size(0), restart = result_.restart;
    const Tensor rows = at::arange(S, r.options().dtype(at::kLong));
    const Tensor small = at::empty({S, SmallProblem::size(restart)}, r.options().dtype(at::kDouble));
    Lookout lookout(r.device());
    V_->reserve(1);
    krylov::orthonormalize(V_->blocks(), rows, 0, r);
    int64_t j = 0;
    for (bool done = false; j < restart && !done; ++j) {
      const Tensor v = V_->vectors(j, rows, S);
      const Tensor w = A_.apply(M_ ? M_->apply(v) : v);
      V_->reserve(j + 2);
      krylov::rotate(small, krylov::orthonormalize(V_->blocks(), rows, j + 1, w), limits, restart, eps_);
      done = lookout.all_done(small.select(1, SmallProblem::kEnd).eq(double(End::restart)));
      if (options_.interrupt) options_.interrupt();
    }
    return {krylov::combine(V_->blocks(), rows, krylov::solve(small, restart, j)), small};
  }

  // What the small problems say goes into the systems.
  void report(const Tensor& records) {
    for (size_t i = 0; i < open_.size(); ++i) {
      System& s = open_[i];
      const double* record = records.const_data_ptr<double>() + int64_t(i) * records.stride(0);
      const auto steps = int64_t(record[SmallProblem::kSteps]);
      for (int64_t j = 0; j < steps; ++j) s.history.push_back(s.residual * record[SmallProblem::kHistory + j]);
      s.iterations += steps;
      s.end = static_cast<End>(int(record[SmallProblem::kEnd]));
      s.singular = record[SmallProblem::kSingular] != 0;
    }
  }

  std::optional<Convolution> convolution_;  // A, where a cycle is one launch
  std::unique_ptr<Basis> V_;
};

}  // namespace

GmresResult device_gmres(const LinearMap& A, const Tensor& b, const std::optional<Tensor>& x0, const LinearMap* M,
                         const GmresOptions& options) {
  return DeviceGmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
