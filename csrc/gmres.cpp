// The algorithm of gmres.h over the verbs of krylov.h.
#include "gmres.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "basis.h"
#include "hessenberg.h"
#include "krylov.h"

namespace convbn {

const char* name(Status status) {
  switch (status) {
    case Status::converged:
      return "converged";
    case Status::maxiter:
      return "maxiter";
    case Status::stagnation:
      return "stagnation";
    case Status::breakdown:
      return "breakdown";
    case Status::singular:
      return "singular";
    case Status::nonfinite:
      return "nonfinite";
  }
  return "?";
}

namespace {

using complex_t = c10::complex<double>;

// What rounding leaves of a vector that lies in the span of the basis, in units of eps·‖w‖.
constexpr double kNoise = 8;
// A cycle that the recurrence ended must lower the true residual to this part, else rounding has taken over.
constexpr double kClaimMustHold = 0.5;

// Why a system left its cycle.
enum class End { restart, claimed, exhausted, maxiter, nonfinite };

struct System {
  int64_t row;          // in b
  double target = 0;    // for ‖b − A x‖
  double residual = 0;  // true, at the start of the cycle
  int64_t iterations = 0;
  double gain = 0;      // ‖new residual‖ / ‖old one‖ of the last cycle
  int slow_cycles = 0;  // in a row
  std::vector<double> history;
  HessenbergQR hessenberg;
  End end = End::restart;
};

at::Tensor index_tensor(const std::vector<int64_t>& indices) { return at::tensor(indices, at::kLong); }

// A column (S, 1) of per-system factors, to multiply rows with.
at::Tensor column(const std::vector<double>& values, const at::Tensor& like) {
  return at::tensor(values, at::kDouble).unsqueeze(1).to(like.device(), like.scalar_type());
}

std::vector<double> row_norms(const at::Tensor& x) {
  const at::Tensor norms = krylov::norms(x);
  return {norms.const_data_ptr<double>(), norms.const_data_ptr<double>() + norms.numel()};
}

class Gmres {
 public:
  Gmres(const LinearMap& A, const at::Tensor& b, const LinearMap* M, const GmresOptions& options)
      : A_(A), M_(M), b_(b), options_(options) {
    const int64_t B = b.size(0), n = b.size(1), bases = options.flexible ? 2 : 1;
    const auto dtype = options.inner_dtype.value_or(b.scalar_type());
    eps_ = c10::toRealValueType(dtype) == at::kFloat ? std::numeric_limits<float>::epsilon()
                                                     : std::numeric_limits<double>::epsilon();
    result_.restart = options.restart > 0 ? std::min(options.restart, n) : n;
    if (options.max_basis_bytes > 0) {
      const int64_t vector_bytes = std::max<int64_t>(B * n * int64_t(c10::elementSize(dtype)) * bases, 1);
      const int64_t allowed = std::max<int64_t>(options.max_basis_bytes / vector_bytes - 1, 1);
      result_.basis_limited = allowed < result_.restart;
      result_.restart = std::min(result_.restart, allowed);
    }
    V_ = std::make_unique<Basis>(result_.restart + 1, B, n, b.options().dtype(dtype));
    if (options.flexible) Z_ = std::make_unique<Basis>(result_.restart, B, n, b.options().dtype(dtype));
  }

  GmresResult solve(const std::optional<at::Tensor>& x0) {
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

  // One restart cycle of Arnoldi steps; returns the corrections M V y of the open systems (S, n).
  at::Tensor correction() {
    const auto S = int64_t(open_.size());
    std::vector<double> beta(S);
    for (int64_t s = 0; s < S; ++s) {
      beta[s] = open_[s].residual;
      open_[s].hessenberg = HessenbergQR();
      open_[s].end = End::restart;
    }
    std::vector<int64_t> active(S);
    std::iota(active.begin(), active.end(), 0);
    const at::Tensor all = index_tensor(active);
    const at::Tensor scale = column(beta, r_);
    V_->reserve(1);
    krylov::orthonormalize(V_->blocks(), all, 0, (r_ / scale).to(V_->dtype()));  // v₀ ← r / β

    for (int64_t j = 0; j < result_.restart && !active.empty(); ++j) {
      const at::Tensor rows = index_tensor(active);
      const at::Tensor v = V_->vectors(j, rows, S);
      const at::Tensor z = M_ ? M_->apply(v) : v;  // z ← M vⱼ
      if (Z_) Z_->assign(j, rows, z);
      const at::Tensor w = A_.apply(z);  // w ← A z
      V_->reserve(j + 2);
      const at::Tensor H = krylov::orthonormalize(V_->blocks(), rows, j + 1, w);  // vⱼ₊₁ ← (I − V Vᴴ) w / ‖·‖
      std::vector<int64_t> still;
      for (size_t a = 0; a < active.size(); ++a)
        if (extend(open_[active[a]], H.const_data_ptr<complex_t>() + int64_t(a) * (j + 3), j))
          still.push_back(active[a]);
      active = std::move(still);
      if (options_.on_step) options_.on_step([&] { return estimates(); }, [&] { return residual_vectors(all, scale); });
    }

    const at::Tensor y = coefficients([](const System& s) { return s.hessenberg.solve(); });
    if (Z_) return krylov::combine(Z_->blocks(), all, y).to(b_.scalar_type()) * scale;  // Z y
    const at::Tensor u = krylov::combine(V_->blocks(), all, y);                         // M (V y)
    return (M_ ? M_->apply(u) : u).to(b_.scalar_type()) * scale;
  }

  // Column j of H arrives: h(0 … j), H(j+1, j), ‖w‖. Rotates it and says whether the system goes on.
  bool extend(System& s, const complex_t* h, int64_t j) {
    const double next = h[j + 1].real(), w_norm = h[j + 2].real(), noise = kNoise * eps_ * w_norm;
    if (!std::isfinite(next) || !std::isfinite(w_norm)) {
      s.end = End::nonfinite;
      return false;
    }
    const bool exhausted = next <= noise;  // relative: the scale of A must not matter
    const double estimate = s.residual * s.hessenberg.append(h, exhausted ? 0 : next, noise);
    s.history.push_back(estimate);
    ++s.iterations;
    if (exhausted)
      s.end = End::exhausted;
    else if (estimate <= std::max(s.target, 4 * eps_ * s.residual))
      s.end = End::claimed;
    else if (s.iterations == options_.maxiter)
      s.end = End::maxiter;
    return s.end == End::restart;
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
    if (s.end == End::exhausted && !held) return s.hessenberg.singular() ? Status::singular : Status::breakdown;
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

  at::Tensor open_rows() const {
    std::vector<int64_t> rows;
    for (const System& s : open_) rows.push_back(s.row);
    return index_tensor(rows).to(b_.device());
  }

  // Small vectors, one per open system, as (S, longest) with zeros behind.
  template <class Vector>
  at::Tensor coefficients(const Vector& vector) const {
    std::vector<std::vector<std::complex<double>>> all;
    size_t longest = 0;
    for (const System& s : open_) longest = std::max(longest, all.emplace_back(vector(s)).size());
    const at::Tensor y = at::zeros({int64_t(all.size()), int64_t(longest)}, at::kComplexDouble);
    for (size_t s = 0; s < all.size(); ++s)
      std::copy(all[s].begin(), all[s].end(), y.mutable_data_ptr<complex_t>() + s * longest);
    return y;
  }

  // ‖b − A x‖ (B,) as far as known: the recurrence for open systems, the true residual for the others.
  at::Tensor estimates() const {
    std::vector<double> norms = residual_;
    for (const System& s : open_) norms[s.row] = s.history.back();
    return at::tensor(norms, at::kDouble);
  }

  // b − A x (B, n) of the open systems within a cycle, from the basis; zero for the others.
  at::Tensor residual_vectors(const at::Tensor& slots, const at::Tensor& scale) const {
    const at::Tensor c = coefficients([](const System& s) { return s.hessenberg.residual(); });
    const at::Tensor r = krylov::combine(V_->blocks(), slots, c).to(b_.scalar_type()) * scale;
    return at::zeros_like(b_).index_copy_(0, open_rows(), r);
  }

  const LinearMap& A_;
  const LinearMap* M_;
  const at::Tensor b_;
  const GmresOptions& options_;
  double eps_;
  GmresResult result_;
  std::unique_ptr<Basis> V_, Z_;
  std::vector<System> open_;      // in the order of their rows; slot s of the basis is open_[s]
  at::Tensor r_;                  // (S, n) residuals of the open systems
  std::vector<double> residual_;  // (B,)
};

}  // namespace

GmresResult gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0, const LinearMap* M,
                  const GmresOptions& options) {
  TORCH_CHECK_VALUE(b.dim() == 2, "gmres: b must have shape (B, n), got ", b.sizes());
  TORCH_CHECK_TYPE(b.is_floating_point() || b.is_complex(), "gmres: b must be real or complex floating point, got ",
                   b.dtype());
  TORCH_CHECK_VALUE(!x0 || x0->sizes() == b.sizes(), "gmres: x0 must have the shape of b ", b.sizes(), ", got ",
                    x0->sizes());
  TORCH_CHECK_VALUE(options.rtol >= 0 && options.atol >= 0, "gmres: rtol and atol must not be negative, got ",
                    options.rtol, " and ", options.atol);
  const c10::NoGradGuard no_grad;
  return Gmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
