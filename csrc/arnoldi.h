// The small arithmetic of an Arnoldi step, the same on the host and in a kernel:
//
//   min_y ‖e₁ − H y‖,   H = Q [R; 0],   g = Qᴴ e₁,   |g(j+1)| = the minimum after j + 1 columns (in units of β = ‖r₀‖),
//
// one column of H and one Givens rotation a step, and why a system leaves its cycle. Neither torch nor CUDA headers.
#pragma once
#include <cmath>
#include <complex>
#include <cstdint>
#include <type_traits>

#include "host_device.h"

namespace convbn {

// What rounding leaves of a vector that lies in the span of the basis, in units of eps·‖w‖.
constexpr double kNoise = 8;

// Why a system left its cycle.
enum class End { restart, claimed, exhausted, maxiter, nonfinite };

CONVBN_HOST_DEVICE inline End end_of_step(bool exhausted, double estimate, double target, bool last) {
  if (exhausted) return End::exhausted;
  if (estimate <= target) return End::claimed;
  return last ? End::maxiter : End::restart;
}

template <class scalar>
CONVBN_HOST_DEVICE scalar conjugate(scalar a) {
  if constexpr (std::is_floating_point_v<scalar>) {
    return a;
  } else {
    return std::conj(a);
  }
}

// [cs, sn; −conj(sn), cs] from the left.
template <class scalar>
struct Rotation {
  double cs;
  scalar sn;

  CONVBN_HOST_DEVICE void apply(scalar& a, scalar& b) const {
    const scalar top = cs * a + sn * b;
    b = cs * b - conjugate(sn) * a;
    a = top;
  }
};

// What is negligible of column j after its rotations: where it depends on the others, they leave √(j + 1) as much
// rounding as there was.
CONVBN_HOST_DEVICE inline double negligible_part(double noise, int64_t j, bool exhausted) {
  return exhausted ? noise * std::sqrt(static_cast<double>(j + 1)) : noise;
}

// The rotation that takes (r, next), next ≥ 0, to (r', 0); r becomes r'. A column of which no more than `negligible` is
// left beside the others adds nothing: r' = 1, its coefficient in y becomes zero, and it counts as singular.
template <class scalar>
CONVBN_HOST_DEVICE Rotation<scalar> eliminate(scalar& r, double next, double negligible, bool& singular) {
  const double size = std::abs(r), length = std::hypot(size, next);
  singular = length <= negligible;
  if (singular) {
    r = scalar(1);
    return {0, scalar(1)};
  }
  const scalar phase = size > 0 ? r / size : scalar(1);
  r = phase * length;
  return {size / length, phase * (next / length)};
}

// The small problem of one real system in memory that a kernel can own: `record` is what the host wants to know
// (steps, End, singular, then the residual norm after each step in units of β), the rest is H's factorisation.
struct SmallProblem {
  double *record, *cs, *sn, *g, *R;  // R by columns, column j at j(j+1)/2

  enum { kSteps, kEnd, kSingular, kHistory };

  CONVBN_HOST_DEVICE static constexpr int64_t record_size(int64_t restart) { return kHistory + restart; }
  CONVBN_HOST_DEVICE static constexpr int64_t size(int64_t restart) {
    return record_size(restart) + 3 * restart + 1 + restart * (restart + 1) / 2;
  }
  CONVBN_HOST_DEVICE static SmallProblem in(double* memory, int64_t restart) {
    double* cs = memory + kHistory + restart;
    return {memory, cs, cs + restart, cs + 2 * restart, cs + 3 * restart + 1};
  }

  CONVBN_HOST_DEVICE void begin() const {
    record[kSteps] = record[kEnd] = record[kSingular] = 0;
    g[0] = 1;
  }
  CONVBN_HOST_DEVICE int steps() const { return static_cast<int>(record[kSteps]); }
  CONVBN_HOST_DEVICE bool open() const { return record[kEnd] == static_cast<double>(End::restart); }

  // Takes column j = steps() of H, h(0 … j) with `next` below it and ‖w‖ = w_norm: v_{j+1} = w / next. h is overwritten
  // by the column of R. `target` (in units of β) and `limit` (steps) end the cycle.
  CONVBN_HOST_DEVICE void append(double* h, double next, double w_norm, double eps, double target, double limit) const {
    if (!std::isfinite(next) || !std::isfinite(w_norm)) {
      record[kEnd] = static_cast<double>(End::nonfinite);
      return;
    }
    const int j = steps();
    const double noise = kNoise * eps * w_norm;  // relative: the scale of A must not matter
    const bool exhausted = next <= noise;
    double* column = R + int64_t{j} * (j + 1) / 2;
    for (int i = 0; i < j; ++i) {
      Rotation<double>{cs[i], sn[i]}.apply(h[i], h[i + 1]);
      column[i] = h[i];
    }
    bool singular = false;
    const Rotation<double> rotation =
        eliminate(h[j], exhausted ? 0 : next, negligible_part(noise, j, exhausted), singular);
    column[j] = h[j];
    cs[j] = rotation.cs;
    sn[j] = rotation.sn;
    g[j + 1] = 0;
    rotation.apply(g[j], g[j + 1]);
    const double estimate = std::abs(g[j + 1]);
    record[kHistory + j] = estimate;
    record[kSteps] = j + 1;
    record[kSingular] = singular;
    record[kEnd] = static_cast<double>(end_of_step(exhausted, estimate, target, j + 1 >= limit));
  }
};

}  // namespace convbn
