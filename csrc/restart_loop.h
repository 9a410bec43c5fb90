// What single and block GMRES share: systems with a target and a status each, cycles that end in a true residual, and
// the verdict on it. How a cycle finds its correction is up to the method.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "arnoldi.h"
#include "gmres.h"
#include "krylov.h"

namespace convbn {

// A cycle that the recurrence ended must lower the true residual to this part, else rounding has taken over.
inline constexpr double kClaimMustHold = 0.5;

struct System {
  int64_t row;          // in b
  double target = 0;    // for ‖b − A x‖
  double residual = 0;  // true, at the start of the cycle
  int64_t iterations = 0;
  double gain = 0;      // ‖new residual‖ / ‖old one‖ of the last cycle
  int slow_cycles = 0;  // in a row
  std::vector<double> history;
  End end = End::restart;
  bool singular = false;  // A M is singular on the exhausted Krylov space
};

inline at::Tensor index_tensor(const std::vector<int64_t>& indices) { return at::tensor(indices, at::kLong); }

// A column (S, 1) of per-system factors, to multiply rows with.
inline at::Tensor column(const std::vector<double>& values, const at::Tensor& like) {
  return at::tensor(values, at::kDouble).unsqueeze(1).to(like.device(), like.scalar_type());
}

inline std::vector<double> row_norms(const at::Tensor& x) {
  const at::Tensor norms = krylov::norms(x).cpu();
  return {norms.const_data_ptr<double>(), norms.const_data_ptr<double>() + norms.numel()};
}

class RestartLoop {
 public:
  RestartLoop(const LinearMap& A, const at::Tensor& b, const LinearMap* M, const GmresOptions& options)
      : A_(A), M_(M), b_(b), options_(options), dtype_(options.inner_dtype.value_or(b.scalar_type())) {
    TORCH_CHECK_VALUE(b.dim() == 2, "gmres: b must have shape (B, n), got ", b.sizes());
    TORCH_CHECK_TYPE(b.is_floating_point() || b.is_complex(), "gmres: b must be real or complex floating point, got ",
                     b.dtype());
    TORCH_CHECK_VALUE(options.rtol >= 0 && options.atol >= 0, "gmres: rtol and atol must not be negative, got ",
                      options.rtol, " and ", options.atol);
    eps_ = c10::toRealValueType(dtype_) == at::kFloat ? std::numeric_limits<float>::epsilon()
                                                      : std::numeric_limits<double>::epsilon();
  }
  virtual ~RestartLoop() = default;

  GmresResult solve(const std::optional<at::Tensor>& x0) {
    TORCH_CHECK_VALUE(!x0 || x0->sizes() == b_.sizes(), "gmres: x0 must have the shape of b ", b_.sizes(), ", got ",
                      x0->sizes());
    const c10::NoGradGuard no_grad;
    start(x0);
    while (!open_.empty()) {
      if (options_.max_cycles > 0 && result_.cycles == options_.max_cycles) {
        for (System& s : open_) finish(s, Status::maxiter);
        break;
      }
      ++result_.cycles;
      const at::Tensor rows = open_rows();
      const at::Tensor x = result_.x.index_select(0, rows) + correction();
      const at::Tensor r = b_.index_select(0, rows) - A_.apply(x);
      accept(rows, x, r);
      if (options_.on_cycle) options_.on_cycle(result_.x);
      close();
    }
    result_.residual = at::tensor(residual_, at::kDouble);
    return std::move(result_);
  }

 protected:
  // One restart cycle: M u with u from a Krylov space of A M and r_, for the open systems (S, n). Fills their history,
  // iterations, end and singular.
  virtual at::Tensor correction() = 0;

  // `vectors` basis vectors of `bytes` each and one more must fit in max_basis_bytes, or restart is lowered and it is
  // said so.
  void limit_restart(int64_t bytes) {
    const int64_t n = b_.size(1);
    result_.restart = options_.restart > 0 ? std::min(options_.restart, n) : n;
    if (options_.max_basis_bytes == 0) return;
    const int64_t allowed = std::max<int64_t>(options_.max_basis_bytes / std::max<int64_t>(bytes, 1) - 1, 1);
    result_.basis_limited = allowed < result_.restart;
    result_.restart = std::min(result_.restart, allowed);
  }

  // A step of a block that all open systems share: their residual norms in units of the cycle's first ones, directions
  // that are left, the smallest entry on H's new diagonal and ‖W‖. Whether the cycle ends with it.
  template <class Norms>
  bool share_step(const Norms& estimates, bool any_left, double smallest, double w_norm) {
    bool all = true, limit = false;
    for (size_t i = 0; i < open_.size(); ++i) {
      System& s = open_[i];
      const double estimate = s.residual * estimates[i];
      s.history.push_back(estimate);
      limit |= ++s.iterations == options_.maxiter;
      s.singular |= smallest <= kNoise * eps_ * w_norm;
      all &= estimate <= cycle_target(s);
    }
    const End end = end_of_step(!any_left, all ? 0 : 1, 0, limit);
    for (System& s : open_) s.end = end;
    return end != End::restart;
  }

  // Whether R is singular on what the open systems share; an exhausted space may show it in no single step.
  template <class Triangle>
  bool settle_singular(const Triangle& triangle, int64_t steps) {
    const System& s = open_.front();
    const bool singular = s.singular || (s.end == End::exhausted && triangle.singular(steps, kNoise * eps_));
    for (System& each : open_) each.singular = singular;
    return singular;
  }

  // Target of the recurrence in a cycle: below a few eps of its start it shows nothing but rounding.
  double cycle_target(const System& s) const { return std::max(s.target, 4 * eps_ * s.residual); }

  // ‖b − A x‖ (B,) as far as known: the recurrence for open systems, the true residual for the others.
  at::Tensor estimates() const {
    std::vector<double> norms = residual_;
    for (const System& s : open_) norms[s.row] = s.history.back();
    return at::tensor(norms, at::kDouble);
  }

  at::Tensor open_rows() const {
    std::vector<int64_t> rows;
    for (const System& s : open_) rows.push_back(s.row);
    return index_tensor(rows).to(b_.device());
  }

  const LinearMap& A_;
  const LinearMap* M_;
  const at::Tensor b_;
  const GmresOptions& options_;
  const at::ScalarType dtype_;  // of the basis
  double eps_;                  // of dtype_
  GmresResult result_;
  std::vector<System> open_;  // in the order of their rows
  at::Tensor r_;              // (S, n) residuals of the open systems

 private:
  // r ← b − A x₀; systems that are solved, zero or not finite never enter a cycle.
  void start(const std::optional<at::Tensor>& x0) {
    const int64_t B = b_.size(0);
    result_.x = x0 ? x0->to(b_.options()).clone() : at::zeros_like(b_);
    r_ = x0 ? b_ - A_.apply(result_.x) : b_.clone();
    result_.status.resize(B), result_.iterations.resize(B), result_.history.resize(B), residual_.resize(B);
    const auto b_norms = row_norms(b_), r_norms = row_norms(r_);
    for (int64_t row = 0; row < B; ++row) {
      System s{.row = row, .target = std::max(options_.rtol * b_norms[row], options_.atol), .residual = r_norms[row]};
      if (b_norms[row] == 0) {  // x = 0 is exact, whatever A and x₀ are
        result_.x.select(0, row).zero_();
        s.residual = 0;
      }
      s.history.push_back(s.residual);
      open_.push_back(std::move(s));
    }
    close();
  }

  // Takes the new iterates whose true residual is not larger; an iterate is never given up for a worse one.
  void accept(const at::Tensor& rows, const at::Tensor& x, const at::Tensor& r) {
    const auto norms = row_norms(r);
    std::vector<int64_t> better;
    for (size_t i = 0; i < open_.size(); ++i) {
      System& s = open_[i];
      s.gain = norms[i] / s.residual;
      s.slow_cycles = s.gain > options_.least_reduction ? s.slow_cycles + 1 : 0;
      if (!(s.gain <= 1)) continue;
      s.residual = norms[i];
      s.history.back() = norms[i];
      better.push_back(int64_t(i));
    }
    const at::Tensor taken = index_tensor(better).to(x.device());
    result_.x.index_copy_(0, rows.index_select(0, taken), x.index_select(0, taken));
    r_.index_copy_(0, taken, r.index_select(0, taken));
  }

  // The status of a system between cycles, if it has one; success is what the true residual shows, nothing else.
  std::optional<Status> verdict(const System& s) const {
    if (!std::isfinite(s.residual)) return Status::nonfinite;
    if (s.residual <= s.target) return Status::converged;
    if (!std::isfinite(s.gain) || s.end == End::nonfinite) return Status::nonfinite;
    const bool held = s.gain <= kClaimMustHold, stuck = s.gain >= 1;
    if (s.end == End::exhausted && !held) return s.singular ? Status::singular : Status::breakdown;
    if (options_.maxiter > 0 && s.iterations >= options_.maxiter) return Status::maxiter;
    if (stuck || s.slow_cycles == 2 || (s.end == End::claimed && !held)) return Status::stagnation;
    return std::nullopt;
  }

  // Takes out the systems that have their status.
  void close() {
    std::vector<System> open;
    std::vector<int64_t> kept;
    for (size_t i = 0; i < open_.size(); ++i) {
      if (const auto status = verdict(open_[i])) {
        finish(open_[i], *status);
      } else {
        kept.push_back(int64_t(i));
        open.push_back(std::move(open_[i]));
      }
    }
    if (kept.size() < open_.size()) r_ = r_.index_select(0, index_tensor(kept).to(r_.device()));
    open_ = std::move(open);
  }

  void finish(System& s, Status status) {
    result_.status[s.row] = status;
    result_.iterations[s.row] = s.iterations;
    result_.history[s.row] = std::move(s.history);
    residual_[s.row] = s.residual;
  }

  std::vector<double> residual_;  // (B,)
};

}  // namespace convbn
