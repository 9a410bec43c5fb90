// Krylov verbs on the CPU.
//
//   A vector of n scalars is cut into chunks of 4 KiB or less (by n, k and the dtype alone). One chunk of w stays in
//   the L1 cache, the same chunk of all k basis vectors in the L2 cache, so CGS2 reads the basis from memory three
//   times: (1) h = Vᴴw, (2) w −= V h and at once, on the same chunk, h' = Vᴴw, (3) w −= V h'. Pass (2) runs through the
//   chunks backwards and finds the last ones of pass (1) in the cache. Where ‖w‖² − ‖h‖², known after (1), is more than
//   half of ‖w‖², nothing cancels: h' and (3) are left out and orthogonality is that of rounding all the same (Daniel,
//   Gragg, Kaufman & Stewart, 1976). Chunk sums are formed in the working precision and merged in float64 in the order
//   of the chunks. Work is split over systems, or over chunks when there are fewer systems than threads; either way the
//   sums are the same.
//
// Inner loops: krylov_loops.h, once per instruction set.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/real.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../krylov.h"
#include "isa.h"
#include "krylov_chunks.h"

#define CONVBN_LOOPS "krylov_reals.inl"
#include "each_isa.inl"

namespace convbn {
namespace {

template <class real>
struct Loops {
  void (*dots)(const real* const* V, int64_t k, int64_t at, const real* w, int64_t n, double* out);
  void (*update)(const real* const* V, int64_t k, int64_t at, const double* h, real* w, int64_t n);
  void (*scale)(const real* x, real factor, real* y, int64_t n);
  real (*amax)(const real* x, int64_t n);
};

#define LOOPS_OF(isa, name) \
  Loops<real> { isa::name::dots, isa::name::update, isa::name::scale, isa::name::amax }
template <class real>
const Loops<real>& loops() {
  static const Loops<real> best = [] {
    if constexpr (std::is_same_v<real, float>)
      return best_of(LOOPS_OF(baseline, f32), LOOPS_OF(avx2, f32), LOOPS_OF(avx512, f32));
    else
      return best_of(LOOPS_OF(baseline, f64), LOOPS_OF(avx2, f64), LOOPS_OF(avx512, f64));
  }();
  return best;
}
#undef LOOPS_OF

// y ← 2⁻ᵉ x in two steps, since 2⁻ᵉ itself may be out of range.
template <class real>
void scale_by_power(const real* x, int e, real* y, int64_t n) {
  loops<real>().scale(x, std::ldexp(real(1), -(e / 2)), y, n);
  if (e != 0) loops<real>().scale(y, std::ldexp(real(1), -(e - e / 2)), y, n);
}

// A chunk of complex numbers is a chunk of reals (re, im, re, im, …), and complex sums are two real ones:
//   vᴴw = Σ v·w + i Σ v·(Jw)  with  J(re, im) = (im, −re),     w − Σ hⱼvⱼ = w − Σ Re(hⱼ) vⱼ + J Σ Im(hⱼ) vⱼ.
template <class real>
void rotate(const real* w, real* Jw, int64_t n) {
  for (int64_t i = 0; i < n; i += 2) Jw[i] = w[i + 1], Jw[i + 1] = -w[i];
}

// out = Vᴴw over one chunk: k real parts, then (complex) k imaginary ones.
template <class real, int parts>
void chunk_dots(const real* const* V, int64_t k, int64_t at, const real* w, int64_t n, double* out) {
  if constexpr (parts == 1) {
    loops<real>().dots(V, k, at, w, n, out);
  } else {
    real Jw[kChunkBytes / sizeof(real)];
    rotate(w, Jw, n);
    loops<real>().dots(V, k, at, w, n, out);
    loops<real>().dots(V, k, at, Jw, n, out + k);
  }
}

// w ← w − Σ_j h_j v_j over one chunk; h laid out like the dots.
template <class real, int parts>
void chunk_update(const real* const* V, int64_t k, int64_t at, const double* h, real* w, int64_t n) {
  loops<real>().update(V, k, at, h, w, n);
  if constexpr (parts == 2) {
    real t[kChunkBytes / sizeof(real)] = {};
    loops<real>().update(V, k, at, h + k, t, n);  // t = −Σ Im(h_j) v_j
    for (int64_t i = 0; i < n; i += 2) w[i] -= t[i + 1], w[i + 1] += t[i];
  }
}

// Addresses of the basis vectors of every active system: row(s)[j] → v_j of system s, as reals.
template <class scalar_t, class real>
class BasisRows {
 public:
  BasisRows(at::TensorList V, const at::Tensor& rows, int64_t k) : k_(k), pointers_(rows.numel() * k) {
    const int64_t* slot = rows.const_data_ptr<int64_t>();
    int64_t j = 0;
    for (const at::Tensor& block : V) {
      for (int64_t i = 0; i < block.size(0) && j < k; ++i, ++j) {
        auto* vectors = reinterpret_cast<real*>(block.data_ptr<scalar_t>() + i * block.stride(0));
        const int64_t stride = block.stride(1) * int64_t(sizeof(scalar_t) / sizeof(real));
        for (int64_t s = 0; s < rows.numel(); ++s) pointers_[s * k + j] = vectors + slot[s] * stride;
      }
    }
    TORCH_CHECK(j == k, "krylov: the basis holds ", j, " vectors, ", k, " are asked for");
  }
  real* const* operator[](int64_t s) const { return pointers_.data() + s * k_; }

 private:
  int64_t k_;
  std::vector<real*> pointers_;
};

// The arithmetic of orthonormalize on raw pointers; see the head of the file.
template <class real, int parts>
class Cgs2 {
 public:
  // V[s][0 … k−1] are the basis, V[s][k] receives the new vector; w has n reals per system; out (systems, k + 2).
  template <class Rows>
  Cgs2(const Rows& V, int64_t systems, int64_t k, const real* w, int64_t n, c10::complex<double>* out)
      : k_(k),
        n_(n),
        length_(chunk_length<real>(k)),
        chunks_(std::max<int64_t>((n + length_ - 1) / length_, 1)),
        w_(w),
        out_(out),
        V_(systems),
        partial_(systems * chunks_ * (width() + 1)),
        h_(systems * width()),
        exponent_(systems, 0),
        factor_(systems, 0),
        again_(systems, 0) {
    for (int64_t s = 0; s < systems; ++s) V_[s] = V[s];
  }

  void run(int64_t first, int64_t last, bool split) {
    const auto chunks = [&](bool backwards, bool over_threads, const auto& work) {
      for_each_chunk(first, last, chunks_, over_threads, backwards, [&](int64_t s, int64_t c) {
        const int64_t at = c * length_;
        work(s, c, at, V_[s][k_] + at, std::min(length_, n_ - at));
      });
    };
    const auto project = [&](int64_t s, int64_t c, int64_t at, real* v, int64_t n) {  // Vᴴv and vᴴv of one chunk
      chunk_dots<real, parts>(V_[s], k_, at, v, n, sums(s, c));
      norm_only(s, c, v, n);
    };

    chunks(false, split, [&](int64_t s, int64_t c, int64_t at, real* v, int64_t n) {  // v ← w, first projection
      scale_by_power(w_ + s * n_ + at, 0, v, n);
      sums(s, c)[width()] = loops<real>().amax(v, n);
      project(s, c, at, v, n);
    });
    if (choose_exponents(first, last))
      chunks(false, split, [&](int64_t s, int64_t c, int64_t at, real* v, int64_t n) {
        if (exponent_[s] == 0) return;
        scale_by_power(v, exponent_[s], v, n);
        project(s, c, at, v, n);
      });
    bool any_again = false;
    for (int64_t s = first; s < last; ++s) any_again |= merge(s, 1);

    if (k_ > 0) {
      chunks(true, split, [&](int64_t s, int64_t c, int64_t at, real* v, int64_t n) {  // v ← v − V h
        chunk_update<real, parts>(V_[s], k_, at, h(s), v, n);
        if (again_[s])
          project(s, c, at, v, n);  // second projection
        else
          norm_only(s, c, v, n);
      });
      for (int64_t s = first; s < last; ++s) merge(s, 2);
    }
    if (any_again) {
      chunks(false, split, [&](int64_t s, int64_t c, int64_t at, real* v, int64_t n) {  // v ← v − V h'
        if (!again_[s]) return;
        chunk_update<real, parts>(V_[s], k_, at, h(s), v, n);
        norm_only(s, c, v, n);
      });
      for (int64_t s = first; s < last; ++s)
        if (again_[s]) merge(s, 3);
    }
    chunks(false, false,
           [&](int64_t s, int64_t, int64_t, real* v, int64_t n) { loops<real>().scale(v, factor_[s], v, n); });
  }

 private:
  // Per chunk: the parts·k dots, the square of the norm, and the largest entry.
  int64_t width() const { return parts * k_ + 1; }
  double* sums(int64_t s, int64_t c) { return partial_.data() + (s * chunks_ + c) * (width() + 1); }
  double* h(int64_t s) { return h_.data() + s * width(); }

  bool choose_exponents(int64_t first, int64_t last) {
    bool any = false;
    for (int64_t s = first; s < last; ++s) {
      double amax = 0;
      for (int64_t c = 0; c < chunks_; ++c) amax = std::max(amax, sums(s, c)[width()]);
      exponent_[s] = safe_exponent<real>(amax);
      any |= exponent_[s] != 0;
    }
    return any;
  }

  void norm_only(int64_t s, int64_t c, real* v, int64_t n) {
    loops<real>().dots(&v, 1, 0, v, n, sums(s, c) + parts * k_);
  }

  // Adds up the chunks in their order: coefficients after pass 1, their corrections after pass 2, norms after each.
  // Returns, after pass 1, whether the projection takes away so much of w that it must be repeated.
  bool merge(int64_t s, int pass) {
    const bool dots = pass == 1 || (pass == 2 && again_[s]);
    double* total = h(s);
    std::fill(total, total + width(), 0.0);
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t i = dots ? 0 : width() - 1; i < width(); ++i) total[i] += sums(s, c)[i];
    const double square = total[width() - 1], norm = std::sqrt(square);
    c10::complex<double>* column = out_ + s * (k_ + 2);
    const auto unscaled = [&](double v) { return std::ldexp(v, exponent_[s]); };
    double projected = 0;
    for (int64_t j = 0; dots && j < k_; ++j) {
      const double re = total[j], im = parts == 2 ? total[k_ + j] : 0.0;
      const c10::complex<double> term(unscaled(re), unscaled(im));
      column[j] = pass == 1 ? term : column[j] + term;
      projected += re * re + im * im;
    }
    column[k_] = unscaled(norm);
    if (pass == 1) {
      column[k_ + 1] = unscaled(norm);
      again_[s] = !(square - projected > kCancels * square);  // also where they are not finite
    }
    factor_[s] = norm > 0 ? real(1 / norm) : real(0);
    return again_[s] && k_ > 0;
  }

  const int64_t k_, n_, length_, chunks_;
  const real* w_;
  c10::complex<double>* out_;
  std::vector<real* const*> V_;
  std::vector<double> partial_, h_;
  std::vector<int> exponent_;
  std::vector<real> factor_;
  std::vector<char> again_;  // not bool: threads write different systems
};

at::Tensor orthonormalize_cpu(at::TensorList V, const at::Tensor& rows, int64_t k, const at::Tensor& w) {
  const at::Tensor vectors = w.resolve_conj().contiguous();
  const int64_t systems = rows.numel();
  at::Tensor H = at::empty({systems, k + 2}, w.options().dtype(at::kComplexDouble));
  AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES(w.scalar_type(), "krylov_orthonormalize", [&] {
    using real = c10::scalar_value_type<scalar_t>::type;
    constexpr int parts = sizeof(scalar_t) / sizeof(real);
    const BasisRows<scalar_t, real> basis(V, rows, k + 1);
    Cgs2<real, parts> cgs2(basis, systems, k, reinterpret_cast<const real*>(vectors.const_data_ptr<scalar_t>()),
                           w.size(1) * parts, H.data_ptr<c10::complex<double>>());
    over_systems(systems, [&](int64_t first, int64_t last, bool split) { cgs2.run(first, last, split); });
  });
  return H;
}

at::Tensor combine_cpu(at::TensorList V, const at::Tensor& rows, const at::Tensor& y) {
  const int64_t systems = rows.numel(), K = y.size(1), n = V.front().size(2);
  at::Tensor out = at::empty({systems, n}, V.front().options());
  const auto coefficients = y.accessor<c10::complex<double>, 2>();
  AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES(out.scalar_type(), "krylov_combine", [&] {
    using real = c10::scalar_value_type<scalar_t>::type;
    constexpr int parts = sizeof(scalar_t) / sizeof(real);
    const BasisRows<scalar_t, real> basis(V, rows, K);
    real* sum = reinterpret_cast<real*>(out.data_ptr<scalar_t>());
    std::vector<double> minus(systems * K * parts);  // the update subtracts
    std::vector<int64_t> used(systems, 0);
    for (int64_t s = 0; s < systems; ++s) {
      for (int64_t j = 0; j < K; ++j)
        if (coefficients[s][j] != 0.0) used[s] = j + 1;
      for (int64_t j = 0; j < used[s]; ++j) {
        minus[s * K * parts + j] = -coefficients[s][j].real();
        if (parts == 2) minus[s * K * parts + used[s] + j] = -coefficients[s][j].imag();
      }
    }
    const int64_t reals = n * parts, length = chunk_length<real>(K), chunks = (reals + length - 1) / length;
    over_systems(systems, [&](int64_t first, int64_t last, bool split) {
      for_each_chunk(first, last, chunks, split, false, [&](int64_t s, int64_t c) {
        const int64_t at = c * length, size = std::min(length, reals - at);
        std::fill_n(sum + s * reals + at, size, real(0));
        chunk_update<real, parts>(basis[s], used[s], at, minus.data() + s * K * parts, sum + s * reals + at, size);
      });
    });
  });
  return out;
}

at::Tensor norms_cpu(const at::Tensor& x) {
  // The norm is what normalising leaves in the column of an empty basis; the normalised vectors are scratch.
  const at::Tensor scratch = at::empty({1, x.size(0), x.size(1)}, x.options());
  return at::real(orthonormalize_cpu({scratch}, at::arange(x.size(0)), 0, x).select(1, 0)).contiguous();
}

}  // namespace
}  // namespace convbn

TORCH_LIBRARY_IMPL(convbn_ext, CPU, m) {
  m.impl("krylov_orthonormalize", &convbn::orthonormalize_cpu);
  m.impl("krylov_combine", &convbn::combine_cpu);
  m.impl("krylov_norms", &convbn::norms_cpu);
}
