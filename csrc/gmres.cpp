// Single GMRES of gmres.h over the verbs of krylov.h.
#include "gmres.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <memory>
#include <numeric>

#include "basis.h"
#include "hessenberg.h"
#include "krylov.h"
#include "restart_loop.h"

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

class Gmres final : public RestartLoop {
 public:
  Gmres(const LinearMap& A, const at::Tensor& b, const LinearMap* M, const GmresOptions& options)
      : RestartLoop(A, b, M, options) {
    const int64_t B = b.size(0), n = b.size(1);
    limit_restart(B * n * int64_t(c10::elementSize(dtype_)) * (options.flexible ? 2 : 1));
    V_ = std::make_unique<Basis>(result_.restart + 1, B, n, b.options().dtype(dtype_));
    if (options.flexible) Z_ = std::make_unique<Basis>(result_.restart, B, n, b.options().dtype(dtype_));
  }

 private:
  // One restart cycle of Arnoldi steps; returns the corrections M V y of the open systems (S, n).
  at::Tensor correction() override {
    const auto S = int64_t(open_.size());
    hessenbergs_.assign(S, HessenbergQR());
    std::vector<double> beta(S);
    for (int64_t s = 0; s < S; ++s) {
      beta[s] = open_[s].residual;

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
      const at::Tensor H = krylov::orthonormalize(V_->blocks(), rows, j + 1, w).cpu();  // vⱼ₊₁ ← (I − V Vᴴ) w / ‖·‖
      std::vector<int64_t> still;
      for (size_t a = 0; a < active.size(); ++a)
        if (extend(open_[active[a]], hessenbergs_[active[a]], H.const_data_ptr<complex_t>() + int64_t(a) * (j + 3), j))
          still.push_back(active[a]);
      active = std::move(still);
      if (options_.interrupt) options_.interrupt();
      if (options_.on_step) options_.on_step([&] { return estimates(); }, [&] { return residual_vectors(all, scale); });
    }

    const at::Tensor y = coefficients([](const HessenbergQR& hessenberg) { return hessenberg.solve(); });
    if (Z_) return krylov::combine(Z_->blocks(), all, y).to(b_.scalar_type()) * scale;  // Z y
    const at::Tensor u = krylov::combine(V_->blocks(), all, y);                         // M (V y)
    return (M_ ? M_->apply(u) : u).to(b_.scalar_type()) * scale;
  }

  // Column j of H arrives: h(0 … j), H(j+1, j), ‖w‖. Rotates it and says whether the system goes on.
  bool extend(System& s, HessenbergQR& hessenberg, const complex_t* h, int64_t j) {
    const double next = h[j + 1].real(), w_norm = h[j + 2].real(), noise = kNoise * eps_ * w_norm;
    if (!std::isfinite(next) || !std::isfinite(w_norm)) {
      s.end = End::nonfinite;
      return false;
    }
    const bool exhausted = next <= noise;  // relative: the scale of A must not matter
    const double estimate =
        s.residual * hessenberg.append(h, exhausted ? 0 : next, negligible_part(noise, j, exhausted));
    s.singular = hessenberg.singular();
    s.history.push_back(estimate);
    ++s.iterations;
    s.end = end_of_step(exhausted, estimate, cycle_target(s), s.iterations == options_.maxiter);
    return s.end == End::restart;
  }

  // Small vectors, one per open system, as (S, longest) with zeros behind.
  template <class Vector>
  at::Tensor coefficients(const Vector& vector) const {
    std::vector<std::vector<std::complex<double>>> all;
    size_t longest = 0;
    for (const HessenbergQR& hessenberg : hessenbergs_)
      longest = std::max(longest, all.emplace_back(vector(hessenberg)).size());
    const at::Tensor y = at::zeros({int64_t(all.size()), int64_t(longest)}, at::kComplexDouble);
    for (size_t s = 0; s < all.size(); ++s)
      std::copy(all[s].begin(), all[s].end(), y.mutable_data_ptr<complex_t>() + s * longest);
    return y;
  }

  // b − A x (B, n) of the open systems within a cycle, from the basis; zero for the others.
  at::Tensor residual_vectors(const at::Tensor& slots, const at::Tensor& scale) const {
    const at::Tensor c = coefficients([](const HessenbergQR& hessenberg) { return hessenberg.residual(); });
    const at::Tensor r = krylov::combine(V_->blocks(), slots, c).to(b_.scalar_type()) * scale;
    return at::zeros_like(b_).index_copy_(0, open_rows(), r);
  }

  std::unique_ptr<Basis> V_, Z_;           // slot s belongs to open_[s]
  std::vector<HessenbergQR> hessenbergs_;  // one per open system
};

}  // namespace

GmresResult gmres(const LinearMap& A, const at::Tensor& b, const std::optional<at::Tensor>& x0, const LinearMap* M,
                  const GmresOptions& options) {
  if (!b.is_cpu() && b.is_floating_point() && !options.flexible && !options.on_step)
    return device_gmres(A, b, x0, M, options);
  return Gmres(A, b, M, options).solve(x0);
}

}  // namespace convbn
